"""``isomorph eval``: what a model gets right, greedily, per representation."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from safetensors import SafetensorError
from safetensors.torch import load_file

from isomorph.curriculum.assemble import check_base, open_policy
from isomorph.curriculum.inputs import changed_files
from isomorph.curriculum.judge import ANSWER_TAGS, JudgePool, answer_found, judge
from isomorph.curriculum.lengths import Room, at_most
from isomorph.curriculum.recipe import GeneratedData, JsonlData, Recipe
from isomorph.curriculum.report.run_record import read_run_json, read_summary
from isomorph.curriculum.report.transfer import Accuracy
from isomorph.curriculum.stage import TaskFiles
from isomorph.curriculum.tasks.async_plan import REPRESENTATIONS, Difficulty, draw_tasks
from isomorph.curriculum.tasks.jsonl import read_rows
from isomorph.curriculum.tasks.task import FAMILIES, Task
from isomorph.engine.config import ModelConfig, SamplerConfig, UserError, check_tables
from isomorph.engine.foreign import printable
from isomorph.engine.model.load import load_policy, silence_loaders
from isomorph.engine.model.policy import Policy
from isomorph.engine.model.text import TextCodec
from isomorph.engine.record.checkpoint import latest_checkpoint
from isomorph.engine.rollout.builtin import BuiltinSampler
from isomorph.engine.types import Prompt, Sampling
from isomorph.engine.update.score import share_without_answer, warning_of_no_answer

MODEL_PROMPTS = 100  # per representation, where no recipe says how many
MODEL_MAX_NEW_TOK = 512
MODEL_SEED = 999
MAX_UNKNOWN_SHARE = 0.01  # of the questions' tokens: beyond it the model cannot even read them


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """What is evaluated: a policy, and the recipe it was trained by where it comes from a run."""

    policy: Policy
    source: str  # where the weights came from
    recipe: Recipe | None
    changed: tuple[str, ...] = ()  # sentences on files of the run that are no longer what they were


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """The result on one family and representation."""

    family: str
    representation: str
    accuracy: Accuracy
    floor: float | None  # share that doing one step after the other gets right; None where nobody knows
    no_answer: float  # share of responses that state no answer at all; they count as wrong
    warning: str  # with an example, where none of the responses states one; else ""
    stopped: float  # share of responses that ended by themselves
    num_tok: int  # of the responses
    seconds: float  # of generation

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "family": self.family,
            "representation": self.representation,
            **self.accuracy.to_dict(),
            "floor": self.floor,
            "no_answer": self.no_answer,
            "stopped": self.stopped,
            "tokens": self.num_tok,
            "generate_s": self.seconds,
        }


def evaluate(
    target: str, wanted: Sequence[str], *, prompts: int | None, max_new_tok: int | None, say: Callable[[str], None]
) -> dict[str, Any]:
    """Greedy accuracy of ``target``: a run folder, a model folder, a .gguf file or a hub name. JSON-able.

    ``wanted``: FAMILY:REPRESENTATION or FAMILY:REPRESENTATION=FILE; none: the [eval] of the run's recipe, or the
    generated tasks of all representations for a model. ``say`` is told each result as it comes.

    Raises:
        UserError: the target cannot be loaded, the data cannot be found or do not suit the model.
        DataError: a file of tasks is broken.
    """
    if prompts is not None and prompts < 1:
        raise UserError(f"--prompts must be at least 1, got {prompts}")
    if max_new_tok is not None and max_new_tok < 1:
        raise UserError(f"--max-new-tok must be at least 1, got {max_new_tok}")
    for text in wanted:
        _parse_wanted(text)  # before minutes are spent on loading a model
    candidate = open_candidate(target)
    for note in candidate.policy.notes:
        say(f"note: {note}")
    for sentence in candidate.changed:
        say(f"warning: {sentence}: questions may be other ones, and training may have asked them")
    of_recipe = candidate.recipe.eval.max_new_tok if candidate.recipe else MODEL_MAX_NEW_TOK
    sampling = Sampling(
        temperature=0.0,
        max_new_tok=max_new_tok or of_recipe,
        samples_per_prompt=1,
        stop_ids=candidate.policy.text.stop_ids,
        seed=0,
    )
    scores = []
    lists = _task_lists(candidate, wanted, prompts)
    for name, tasks in zip(wanted or [""] * len(lists), lists, strict=True):
        _refuse_long(candidate.policy, tasks, sampling.max_new_tok, "row" if "=" in name else "question")
    for tasks in lists:
        scores.append(score_tasks(candidate.policy, tasks, sampling))
        say(f"{scores[-1].family}:{scores[-1].representation} {scores[-1].accuracy}")
        if scores[-1].warning:
            say(scores[-1].warning)
    return {
        "target": target,
        "weights": candidate.source,
        "dtype": str(candidate.policy.dtype).removeprefix("torch."),
        "device": str(candidate.policy.device),
        "sampler": "builtin",
        "temperature": 0.0,
        "max_new_tok": sampling.max_new_tok,
        "results": [score.to_dict() for score in scores],
    }


def open_candidate(target: str) -> Candidate:
    """The policy behind a run folder, a model folder, a .gguf file or a hub name. Raises UserError."""
    silence_loaders()
    folder = Path(target).expanduser()
    if (folder / "run.json").is_file():
        return _open_run(folder)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise UserError(f"{target} must be a run folder (with run.json) or a model folder (with config.json)")
    if not folder.exists() and str(folder.parent) != "." and folder.parent.is_dir():
        raise UserError(f"{target}: there is no such folder or file in {folder.parent}")  # and it is no hub name
    config = ModelConfig(path=target, dtype=_dtype())
    policy = load_policy(config, vocabulary=[], seed=0, device=_device(), tags=ANSWER_TAGS)
    return Candidate(policy=policy, source=target, recipe=None)


def _open_run(folder: Path) -> Candidate:
    """The finished model where the run is done, or else the newest checkpoint."""
    described = read_run_json(folder)
    recipe = check_tables(described["recipe"], Recipe, where=f"{folder}/run.json")
    changed = tuple(changed_files(described.get("files", {}), recipe))
    model = folder / "model"
    summary = read_summary(folder)
    if summary is not None and summary["status"] == "done":
        config = recipe.model.model_copy(update={"path": str(model), "tiny": None})
        policy = load_policy(config, vocabulary=[], seed=0, device=_device(), tags=ANSWER_TAGS)
        return Candidate(policy=policy, source=str(model), recipe=recipe, changed=changed)
    newest = latest_checkpoint(folder / "checkpoints")
    if newest is None:
        raise UserError(f"{folder} holds neither a finished model nor a checkpoint: wait for its first checkpoint")
    policy = open_policy(recipe)
    try:
        check_base(policy, json.loads((newest / "state.json").read_text()).get("base", ""), newest)
        weights = load_file(newest / "weights.safetensors")
        policy.overwrite([weights[name] for name in policy.named_parameters()])
    except (OSError, SafetensorError, KeyError, RuntimeError) as error:
        raise UserError(f"{newest}: the weights do not fit the recipe's model: {error}") from error
    return Candidate(policy=policy, source=str(newest), recipe=recipe, changed=changed)


def score_tasks(policy: Policy, tasks: Sequence[Task], sampling: Sampling) -> Score:
    """All tasks are of one family and representation."""
    prompts = [_prompt(i, task, policy.text) for i, task in enumerate(tasks)]
    _refuse_unreadable(prompts, policy.text)
    started = time.perf_counter()
    rollouts = BuiltinSampler(policy, SamplerConfig()).generate(prompts, sampling)
    seconds = time.perf_counter() - started
    texts = [policy.text.decode(rollout.token_ids.tolist()) for rollout in rollouts]
    with JudgePool() as judges:
        rewards = judges(prompts, texts)
    stopped = sum(rollout.finish == "stop" for rollout in rollouts) / len(rollouts)
    found = [answer_found(task.family, text) for task, text in zip(tasks, texts, strict=True)]
    where = f"{tasks[0].family}:{tasks[0].representation}"
    return Score(
        family=tasks[0].family,
        representation=tasks[0].representation,
        accuracy=Accuracy.of(sum(t.is_correct(r) for t, r in zip(tasks, rewards, strict=True)), len(rewards)),
        floor=_floor(tasks),
        no_answer=share_without_answer(found),
        warning=warning_of_no_answer(where, found, texts, 1 - stopped),
        stopped=stopped,
        num_tok=sum(len(rollout.token_ids) for rollout in rollouts),
        seconds=seconds,
    )


def show_scores(result: dict[str, Any], console: Console) -> None:
    """A table, for people."""
    heading = f"{result['weights']}, greedy, at most {result['max_new_tok']} new tokens"
    table = Table(title=Text(printable(heading)), title_justify="left")
    for column in ("data", "accuracy", "95 % interval", "floor", "no answer", "questions", "ended"):
        table.add_column(column, justify="left" if column == "data" else "right")
    for score in result["results"]:
        table.add_row(
            Text(printable(f"{score['family']}:{score['representation']}")),
            f"{score['rate']:.1%}",
            f"{score['low']:.1%} to {score['high']:.1%}",
            "-" if score["floor"] is None else f"{score['floor']:.1%}",
            f"{score['no_answer']:.1%}",
            str(score["n"]),
            f"{score['stopped']:.0%}",
        )
    console.print(table)
    num_tok, seconds = (sum(score[key] for score in result["results"]) for key in ("tokens", "generate_s"))
    console.print("floor: doing one step after the other, without a plan; ended: before the limit", highlight=False)
    console.print(f"{num_tok} tokens in {seconds:.1f} s: {num_tok / seconds:.0f} tokens/s", highlight=False)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _dtype() -> Any:
    return "bfloat16" if _device().type == "cuda" else "float32"


def _prompt(prompt_id: int, task: Task, text: TextCodec) -> Prompt:
    return Prompt(
        prompt_id=prompt_id,
        token_ids=text.encode_prompt(task.question),
        task=task.family,
        representation=task.representation,
        payload=task,
    )


def _refuse_unreadable(prompts: Sequence[Prompt], text: TextCodec) -> None:
    unknown = text.tokenizer.unk_token_id
    tokens = [token for prompt in prompts for token in prompt.token_ids]
    share = tokens.count(unknown) / len(tokens)
    if share > MAX_UNKNOWN_SHARE:
        raise UserError(
            f"the model's tokenizer does not know {share:.0%} of the {prompts[0].representation} questions' words: "
            "evaluate a tiny model by its run folder, whose recipe draws questions from its vocabulary"
        )


def _refuse_long(policy: Policy, tasks: Sequence[Task], max_new_tok: int, noun: str) -> None:
    """Before the first answer is drawn: ``noun`` says what is counted, rows of a file or questions."""
    for i, task in enumerate(tasks):
        num_tok = at_most(policy.text, task.question, policy.max_model_len - max_new_tok, is_prompt=True)
        if num_tok + max_new_tok > policy.max_model_len:
            raise UserError(
                f"{task.representation}, {noun} {i + 1}: a prompt of {num_tok} tokens and {max_new_tok} new ones make "
                f"{num_tok + max_new_tok}, the model has positions for {policy.max_model_len}: lower --max-new-tok, or "
                "take it out"
            )


def _floor(tasks: Sequence[Task]) -> float | None:
    known = [task for task in tasks if task.sequential_answer is not None]
    right = (
        judge(task.family, f"<answer>{task.sequential_answer}</answer>", task.answer, reward=task.reward)
        for task in known
    )
    return sum(right) / len(known) if known else None


def _task_lists(candidate: Candidate, wanted: Sequence[str], prompts: int | None) -> list[list[Task]]:
    recipe = candidate.recipe
    if wanted:
        return [_wanted_tasks(candidate, text, prompts) for text in wanted]
    if recipe is not None:
        return [_recipe_tasks(candidate, name, prompts) for name in recipe.eval.representations]
    return [_drawn(name, prompts) for name in REPRESENTATIONS]


def _parse_wanted(text: str) -> tuple[str, str, Path | None]:
    name, equals, file = text.partition("=")
    family, colon, representation = name.partition(":")
    if family not in FAMILIES or not representation or bool(equals) != bool(file):
        raise UserError(
            f"--data must read FAMILY:REPRESENTATION or FAMILY:REPRESENTATION=FILE with a family of "
            f"{', '.join(FAMILIES)}; got {text!r}"
        )
    return family, representation, Path(file).expanduser() if file else None


def _wanted_tasks(candidate: Candidate, text: str, prompts: int | None) -> list[Task]:
    family, representation, file = _parse_wanted(text)
    if file is not None:
        return read_rows(file, family, representation)[: prompts or MODEL_PROMPTS]
    if candidate.recipe is not None and _recipe_has(candidate.recipe, family, representation):
        return _recipe_tasks(candidate, representation, prompts)
    if family != "async_plan":
        raise UserError(f"--data {text}: only async_plan tasks can be generated; name a file: {text}=FILE")
    if representation not in REPRESENTATIONS:
        raise UserError(f"--data {text}: the representation must be one of {', '.join(REPRESENTATIONS)}")
    return _drawn(representation, prompts)


def _drawn(representation: str, prompts: int | None) -> list[Task]:
    return draw_tasks(Difficulty(), representation, prompts or MODEL_PROMPTS, seed=MODEL_SEED, split="eval")


def _recipe_has(recipe: Recipe, family: str, representation: str) -> bool:
    data = recipe.data[recipe.eval.data]
    if isinstance(data, GeneratedData):
        return family == "async_plan" and representation in REPRESENTATIONS
    return family == data.family and representation in data.files


def _recipe_tasks(candidate: Candidate, representation: str, prompts: int | None) -> list[Task]:
    """The same questions as the exams of the run."""
    assert candidate.recipe is not None
    wanted = candidate.recipe.eval
    data = candidate.recipe.data[wanted.data]
    num = prompts or wanted.prompts
    if isinstance(data, JsonlData):
        room = Room(recipe=candidate.recipe, text=candidate.policy.text, max_model_len=candidate.policy.max_model_len)
        files = TaskFiles(data, candidate.policy.text, wanted.data, room)  # what the run's exams leave out, too
        return files.held_out[representation][:num]
    return draw_tasks(data.difficulty, representation, num, seed=wanted.seed, split="eval")
