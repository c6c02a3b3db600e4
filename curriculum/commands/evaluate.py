"""``isomorph eval``: greedy accuracy of a model or a run, per representation."""

import json
import sys
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
from isomorph.curriculum.environment import check_backends
from isomorph.curriculum.evaluation import evaluate_tasks, evaluation_keys, evaluation_tasks, refuse_long
from isomorph.curriculum.inputs import changed_files
from isomorph.curriculum.lengths import LengthLimits
from isomorph.curriculum.recipe import Recipe
from isomorph.curriculum.report.run_record import read_run_json, read_summary
from isomorph.curriculum.rewards.answer import ANSWER_TAGS
from isomorph.curriculum.rewards.families import ASYNC_PLAN, FAMILIES
from isomorph.curriculum.sources import Source, open_sources
from isomorph.curriculum.tasks.async_plan import REPRESENTATIONS, Difficulty, draw_tasks
from isomorph.curriculum.tasks.jsonl import read_rows
from isomorph.curriculum.tasks.task import Task
from isomorph.engine.config import ModelConfig, UserError
from isomorph.engine.foreign import printable
from isomorph.engine.model.load import load_policy, silence_loaders
from isomorph.engine.model.policy import Policy
from isomorph.engine.recipe_file import check_tables
from isomorph.engine.record.checkpoint import latest_checkpoint
from isomorph.engine.types import Sampling

MODEL_PROMPTS = 100  # per representation, where no recipe says how many
MODEL_MAX_NEW_TOK = 512
MODEL_SEED = 999


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """The policy to evaluate, and the recipe that it was trained with, where it comes from a run."""

    policy: Policy
    source: str  # where the weights came from
    recipe: Recipe | None
    changed: tuple[str, ...] = ()  # a sentence for each input file that has changed since the run began


def evaluate(
    target: str, wanted: Sequence[str], prompts: int | None, max_new_tok: int | None, console: Console, *, as_json: bool
) -> None:
    """Prints a table of ``evaluate_target``, or its JSON; each result also goes to the standard error as it comes."""
    check_backends()
    result = evaluate_target(target, wanted, prompts=prompts, max_new_tok=max_new_tok, say=_to_stderr)
    if as_json:
        sys.stdout.write(json.dumps(result, indent=2) + "\n")
    else:
        show_scores(result, console)


def _to_stderr(line: str) -> None:
    sys.stderr.write(line + "\n")


def evaluate_target(
    target: str, wanted: Sequence[str], *, prompts: int | None, max_new_tok: int | None, say: Callable[[str], None]
) -> dict[str, Any]:
    """Greedy accuracy of ``target``: a run folder, a model folder, a .gguf file or a hub name. JSON-able.

    ``wanted``: FAMILY:REPRESENTATION or FAMILY:REPRESENTATION=FILE; none: the [eval] of the run's recipe, or the
    generated tasks of all representations for a model. ``say`` gets each result as a line.

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
        say(f"warning: {sentence}: the questions may differ from the run's, and training may have used them")
    of_recipe = candidate.recipe.eval.max_new_tok if candidate.recipe else MODEL_MAX_NEW_TOK
    sampling = Sampling(
        temperature=0.0,
        max_new_tok=max_new_tok or of_recipe,
        samples_per_prompt=1,
        stop_ids=candidate.policy.text.stop_ids,
        stop=candidate.recipe.stop_strings if candidate.recipe else (),
        seed=0,
    )
    scores = []
    lists = _task_lists(candidate, wanted, prompts)
    for name, tasks in zip(wanted or [""] * len(lists), lists, strict=True):
        refuse_long(candidate.policy, tasks, sampling.max_new_tok, "row" if "=" in name else "question")
    for tasks in lists:
        scores.append(evaluate_tasks(candidate.policy, tasks, sampling))
        say(f"{scores[-1].family}:{scores[-1].representation} {scores[-1].result.accuracy}")
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
    """Loads the policy of a run folder, a model folder, a .gguf file or a hub name. Raises UserError."""
    silence_loaders()
    folder = Path(target).expanduser()
    if (folder / "run.json").is_file():
        return _open_run(folder)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise UserError(f"{target} must be a run folder (with run.json) or a model folder (with config.json)")
    if not folder.exists() and str(folder.parent) != "." and folder.parent.is_dir():
        raise UserError(
            f"{target}: there is no such folder or file in {folder.parent}"
        )  # a hub name has no such parent
    config = ModelConfig(path=target, dtype=_dtype())
    policy = load_policy(config, vocabulary=[], seed=0, device=_device(), tags=ANSWER_TAGS)
    return Candidate(policy=policy, source=target, recipe=None)


def _open_run(folder: Path) -> Candidate:
    """The finished model, or the newest checkpoint of a run that is not done."""
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


def show_scores(result: dict[str, Any], console: Console) -> None:
    """Prints the results of ``evaluate_target`` as a table."""
    heading = f"{result['weights']}, greedy, at most {result['max_new_tok']} new tokens"
    table = Table(title=Text(printable(heading)), title_justify="left")
    for column in ("data", "accuracy", "95 % interval", "sequential baseline", "no answer", "questions", "ended"):
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
    console.print(
        "sequential baseline: accuracy of answering with the sum of all durations; ended: share of responses that "
        "ended before the length limit",
        highlight=False,
    )
    console.print(f"{num_tok} tokens in {seconds:.1f} s: {num_tok / seconds:.0f} tokens/s", highlight=False)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _dtype() -> Any:
    return "bfloat16" if _device().type == "cuda" else "float32"


def _task_lists(candidate: Candidate, wanted: Sequence[str], prompts: int | None) -> list[list[Task]]:
    recipe = candidate.recipe
    if wanted:
        return [_wanted_tasks(candidate, text, prompts) for text in wanted]
    if recipe is not None:
        sources = _sources(candidate, recipe)
        keys = evaluation_keys(recipe, sources).values()
        return [evaluation_tasks(recipe, sources, one, form, prompts) for one, form in keys]
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
    if candidate.recipe is not None:
        sources = _sources(candidate, candidate.recipe)
        for one, form in evaluation_keys(candidate.recipe, sources).values():
            if (family, representation) == (candidate.recipe.data[one.data].family, form):
                return evaluation_tasks(candidate.recipe, sources, one, form, prompts)
    if family != ASYNC_PLAN.name:
        raise UserError(f"--data {text}: only {ASYNC_PLAN.name} tasks can be generated; name a file: {text}=FILE")
    if representation not in REPRESENTATIONS:
        raise UserError(f"--data {text}: the representation must be one of {', '.join(REPRESENTATIONS)}")
    return _drawn(representation, prompts)


def _drawn(representation: str, prompts: int | None) -> list[Task]:
    return draw_tasks(Difficulty(), representation, prompts or MODEL_PROMPTS, seed=MODEL_SEED, split="eval")


def _sources(candidate: Candidate, recipe: Recipe) -> dict[str, Source]:
    """Without the rows that are too long for the run."""
    text = candidate.policy.text
    return open_sources(
        recipe, text, LengthLimits(recipe=recipe, text=text, max_model_len=candidate.policy.max_model_len)
    )
