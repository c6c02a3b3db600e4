"""The whole loop with real parts: decoder, built-in sampler, learner, disk; the judge and the questions are toys."""

import contextlib
import dataclasses
import gc
import io
import json
import math
import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from isomorph.engine.components import Components
from isomorph.engine.config import (
    BatchConfig,
    ObjectiveConfig,
    OptimConfig,
    RunConfig,
    SamplerConfig,
    SamplingConfig,
    Stage,
    TinyModel,
)
from isomorph.engine.loop import train
from isomorph.engine.model.load import build_tiny
from isomorph.engine.model.policy import Policy
from isomorph.engine.model.scoring import trainer_logprob
from isomorph.engine.record import step_record
from isomorph.engine.record.checkpoint import latest_checkpoint, load_checkpoint, weights_sha256
from isomorph.engine.record.runlog import RunLog, read_steps
from isomorph.engine.record.telemetry import MIN_GROWTH
from isomorph.engine.rollout.builtin import BuiltinSampler
from isomorph.engine.rollout.demonstrations import DemonstrationSampler
from isomorph.engine.types import EvaluationRequest, Group, Prompt, Publication, Rollout, RunFailed, RunState, Sampling
from isomorph.engine.update.learner import Learner
from isomorph.engine.update.micro_batches import Update, pack
from isomorph.kernels import backend

WORDS = ["ask", "gold", "lead", "iron", "tin", "zinc", "one", "two", "three", "four", "five", "six"]
QUESTIONS = ("one", "two", "three", "four", "five", "six")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# -- toys
class Questions:
    """Asks "ask <number>" over and over; after each stage an exam."""

    def __init__(self, policy: Policy, *stages: Stage, examines: bool = False) -> None:
        self.policy, self.stages, self.examines = policy, stages, examines
        self.stage_index = self.steps_done = self.next_id = 0
        self.graded: list[tuple[str, list[float]]] = []
        self.observed: list[list[Group]] = []

    def stage(self) -> Stage | None:
        return self.stages[self.stage_index] if self.stage_index < len(self.stages) else None

    def stage_step(self) -> int:
        return self.steps_done

    def take(self, num_prompts: int) -> list[Prompt]:
        prompts = [self._prompt(self.next_id + i) for i in range(num_prompts)]
        self.next_id += num_prompts
        return prompts

    def demonstrate(self, prompt: Prompt) -> str | None:
        return f"{prompt.payload} gold"

    def is_correct(self, prompt: Prompt, reward: float) -> bool:
        return reward == 1

    def label(self, prompt: Prompt) -> str:
        return prompt.representation

    def observe(self, groups: Sequence[Group]) -> None:
        self.observed.append(list(groups))
        self.steps_done += 1
        stage = self.stage()
        assert stage is not None
        if self.steps_done == stage.steps:
            self.stage_index, self.steps_done = self.stage_index + 1, 0

    def pending_evaluation(self) -> EvaluationRequest | None:
        label = self.stages[self.stage_index - 1].name if self.stage_index else "start"
        if not self.examines or self.steps_done or label in {name for name, _ in self.graded}:
            return None
        return EvaluationRequest(label=label, prompts=tuple(self._prompt(-1 - i) for i in range(3)), max_new_tok=4)

    def record_evaluation(
        self, request: EvaluationRequest, rewards: Sequence[float], found: Sequence[bool] | None
    ) -> str:
        self.found = found
        self.graded.append((request.label, list(rewards)))
        return f"exam after {request.label}: {sum(rewards)}"

    def state_dict(self) -> dict[str, Any]:
        return {
            "stage_index": self.stage_index,
            "steps_done": self.steps_done,
            "next_id": self.next_id,
            "graded": list(self.graded),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stage_index, self.steps_done = state["stage_index"], state["steps_done"]
        self.next_id = state["next_id"]
        self.graded = [(label, rewards) for label, rewards in state["graded"]]

    def _prompt(self, prompt_id: int) -> Prompt:
        word = QUESTIONS[prompt_id % len(QUESTIONS)]
        representation = "graph" if prompt_id % 2 else "natural"
        ids = self.policy.text.encode_prompt(f"ask {word}")
        return Prompt(prompt_id=prompt_id, token_ids=ids, task="toy", representation=representation, payload=word)


def gold(prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
    return [float("gold" in text.split()) for text in texts]


def make_policy() -> Policy:
    tiny = TinyModel(hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, intermediate_size=48, max_model_len=32)
    return build_tiny(tiny, WORDS, seed=0, dtype=torch.float32, device=torch.device("cpu"))


def make_stage(name: str = "words", steps: int = 20, objective: str = "dapo", **choices: Any) -> Stage:
    is_supervised = objective == "sft"
    return Stage(
        name=name,
        steps=steps,
        objective=ObjectiveConfig(name=objective, **choices.pop("objective_choices", {})),  # type: ignore[arg-type]
        optim=OptimConfig(lr=3e-3),
        batch=BatchConfig(prompts=6, micro_batch_tok=64, refills=choices.pop("refills", 0)),
        sampling=SamplingConfig(max_new_tok=4, samples_per_prompt=1 if is_supervised else 8),
        **choices,
    )


def make_components(
    folder: Path,
    *stages: Stage,
    judge: Any = gold,
    examines: bool = False,
    stop_requested: Callable[[], bool] = lambda: False,
    sampler_of: Callable[[Policy], Any] = lambda policy: BuiltinSampler(policy, SamplerConfig()),
    **run: Any,
) -> Components:
    folder.mkdir(exist_ok=True)
    policy = make_policy()
    source = Questions(policy, *stages, examines=examines)
    return Components(
        policy=policy,
        sampler=sampler_of(policy),
        demonstrations=DemonstrationSampler(policy.text, source.demonstrate, max_model_len=policy.max_model_len),
        source=source,
        judge=judge,
        learner=Learner(policy),
        log=RunLog(folder, Console(file=io.StringIO())),
        config=RunConfig(**run),
        stop_requested=stop_requested,
    )


def sha(components: Components) -> str:
    return weights_sha256(dict(components.policy.named_parameters()))


def source_of(components: Components) -> Questions:
    assert isinstance(components.source, Questions)
    return components.source


def console(components: Components) -> str:
    assert isinstance(components.log.console.file, io.StringIO)
    return components.log.console.file.getvalue()


# -- learning
@pytest.mark.parametrize("objective", ["grpo", "gspo", "cispo"])
def test_reward_rises_within_twenty_steps(tmp_path: Path, objective: str) -> None:
    components = make_components(tmp_path, make_stage(objective=objective))
    train(components, RunState())
    rewards = [row["reward/mean"] for row in read_steps(tmp_path)]
    assert len(rewards) == 20
    before, after = sum(rewards[:3]) / 3, sum(rewards[-3:]) / 3
    assert before < 0.6
    assert after > before + 0.3


def test_fifty_steps_with_the_fast_bodies_follow_the_references(tmp_path: Path) -> None:
    """Reward and entropy: two bodies of one seed lie closer together than one body of two seeds."""

    def curves(name: str, seed: int, bodies: contextlib.AbstractContextManager[None]) -> Tensor:
        stage = make_stage(steps=50, objective="grpo", objective_choices=dict(kl_coef=0.01))  # keeps flat groups in
        with bodies:
            train(make_components(tmp_path / name, stage, seed=seed), RunState())
        return torch.tensor([[row["reward/mean"], row["entropy"]] for row in read_steps(tmp_path / name)])

    fast = curves("fast", 0, contextlib.nullcontext())
    ops = ("linear_loss", "linear_logprob", "packed_attention", "group_advantage")
    plain = curves("plain", 0, backend.using(",".join(f"{op}=reference" for op in ops)))
    other = curves("other", 1, contextlib.nullcontext())
    between_bodies, between_seeds = ((fast - curve).abs().mean(0) for curve in (plain, other))
    assert (between_bodies < between_seeds).all(), (between_bodies, between_seeds)
    torch.testing.assert_close(fast[0], plain[0], rtol=1e-5, atol=1e-6)  # before the first update only rounding differs


def test_a_run_is_the_same_bit_for_bit_when_run_again(tmp_path: Path) -> None:
    def once(name: str) -> tuple[str, list[dict[str, Any]]]:
        stages = (
            make_stage("a", 3, "sft"),
            make_stage("b", 4, objective_choices=dict(kl_coef=0.01, importance_sampling="token")),
        )
        components = make_components(tmp_path / name, *stages, examines=True)
        train(components, RunState())
        rows = [
            {k: v for k, v in row.items() if not k.startswith("mem/") and not k.endswith("_s")}
            for row in read_steps(tmp_path / name)
        ]
        return sha(components), rows

    assert once("first") == once("second")


def test_demonstrations_are_learned(tmp_path: Path) -> None:
    components = make_components(tmp_path, make_stage("warm-up", 30, "sft"), examines=True)
    train(components, RunState())
    losses = [row["loss"] for row in read_steps(tmp_path)]
    assert losses[-1] < losses[0] / 2
    assert source_of(components).graded[-1] == ("warm-up", [1.0, 1.0, 1.0])


# -- what a run leaves
def test_every_step_leaves_a_row_whose_numbers_fit_together(tmp_path: Path) -> None:
    components = make_components(tmp_path, make_stage(steps=3), completions_every=2)
    state = train(components, RunState())
    rows = read_steps(tmp_path)
    for number, (row, groups) in enumerate(zip(rows, source_of(components).observed, strict=True), start=1):
        rewards = [r for g in groups for r in g.rewards]
        natural = [r for g in groups if g.prompt.representation == "natural" for r in g.rewards]
        lens = [len(r.token_ids) for g in groups for r in g.rollouts]
        assert (row["step"], row["stage"], row["stage_step"], row["updates"]) == (number, "words", number, 1)
        assert row["reward/mean"] == pytest.approx(sum(rewards) / len(rewards))
        assert row["reward/natural"] == pytest.approx(sum(natural) / len(natural))
        assert row["tok/response"] == sum(lens) == row["tok/loss"]
        assert row["tok/prompt"] == sum(len(g.prompt.token_ids) for g in groups)
        assert (row["groups/all"], row["groups/flat"]) == (6, sum(len(set(g.rewards)) == 1 for g in groups))
        assert 0 < row["entropy"] <= math.log(len(WORDS) + 4)
        assert row["clip_frac"] == 0 and row["drift/max"] < 1e-5 and row["tok/dropped"] == 0
        assert row["lr"] == 3e-3 and row["kl"] is None
        phases = ("ask", "publish", "generate", "judge", "exchange", "pack", "handover", "update", "record")
        assert 0 < sum(row[f"time/{phase}_s"] for phase in phases) <= row["time/step_s"]
        assert row["publish/probe_s"] is None  # the learner compares all that was drawn
        assert {r.policy_version for g in groups for r in g.rollouts} == {number - 1}
    assert [row["publish/fingerprint_s"] is None for row in rows] == [True, False, False]  # first before the step
    assert (state.step, state.num_updates, state.policy_version) == (3, 3, 3)
    assert state.totals["response_tok"] == sum(row["tok/response"] for row in rows)
    assert len([line for line in console(components).splitlines() if line.startswith("step ")]) == 3
    assert "  zero-variance groups " in console(components)
    described = set(re.findall(r"[\w/<>]+", step_record.__doc__ or ""))
    added = ("reward/natural", "reward/graph", "time/", "mem/", "gpu/", "energy/")  # under other words, or elsewhere
    assert {key for key in rows[0] if not key.startswith(added)} < described
    assert [p.name for p in (tmp_path / "completions").iterdir()] == ["step-00000002.jsonl"]


def test_a_first_step_or_an_exam_without_any_answer_is_warned_of_once(tmp_path: Path) -> None:
    stages = make_stage("first", steps=2), make_stage("second", steps=2)
    components = make_components(tmp_path, *stages, examines=True, completions_every=1)
    mute = {-1, -2, -3, *range(12)}  # the first exam and the first stage
    components = dataclasses.replace(components, finds_answer=lambda prompt, text: prompt.prompt_id not in mute)
    source_of(components).examines = True
    train(components, RunState())
    assert [row["judge/no_answer"] for row in read_steps(tmp_path)] == [1.0, 1.0, 0.0, 0.0]
    warnings = [line for line in console(components).splitlines() if "no answer was found" in line]
    assert ["step 1, the first of stage first" in line for line in warnings].count(True) == 1
    assert not any("of step 2" in line or "of step 3" in line for line in warnings)
    assert any("the evaluation after start" in line for line in warnings)
    assert source_of(components).found == [False] * 3
    assert "no answer 100%" in console(components)
    answers = [json.loads(x) for x in (tmp_path / "completions" / "step-00000003.jsonl").read_text().splitlines()]
    assert all(row["answered"] is True for row in answers)


def test_completions_stand_beside_their_own_rewards(tmp_path: Path) -> None:
    components = make_components(tmp_path, make_stage(steps=1), completions_every=1)
    train(components, RunState())
    lines = (tmp_path / "completions" / "step-00000001.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == 48
    assert {row["reward"] for row in rows} == {0.0, 1.0}
    assert all(row["reward"] == float("gold" in row["text"].split()) for row in rows)
    by_id = {g.prompt.prompt_id: g for g in source_of(components).observed[0]}
    assert all(row["advantage"] == by_id[row["prompt_id"]].advantages[row["sample"]] for row in rows)


def test_partial_credit_is_not_a_correct_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def graded(prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
        return [1.0 if "gold" in text.split() else 0.5 if "iron" in text.split() else -1.0 for text in texts]

    components = make_components(tmp_path, make_stage(steps=1), judge=graded, completions_every=1, examines=True)
    counted: list[int] = []
    end = components.log.telemetry.end
    monkeypatch.setattr(
        components.log.telemetry, "end", lambda **told: (counted.append(told["num_correct"]), end(**told))[1]
    )
    train(components, RunState())
    rows = [json.loads(line) for line in (tmp_path / "completions" / "step-00000001.jsonl").read_text().splitlines()]
    assert {row["reward"] for row in rows} == {1.0, 0.5, -1.0}
    assert all(row["correct"] is (row["reward"] == 1) for row in rows)
    assert counted == [sum(row["correct"] for row in rows)]
    exam = [json.loads(line) for line in (tmp_path / "completions" / "exam-words.jsonl").read_text().splitlines()]
    assert all(row["correct"] is (row["reward"] == 1) for row in exam)


def test_exams_are_sat_before_between_and_after_the_stages_and_graded_once(tmp_path: Path) -> None:
    components = make_components(tmp_path, make_stage("a", 2), make_stage("b", 1), examines=True)
    train(components, RunState())
    assert [label for label, _ in source_of(components).graded] == ["start", "a", "b"]
    names = sorted(p.name for p in (tmp_path / "completions").iterdir())
    assert names == ["exam-a.jsonl", "exam-b.jsonl", "exam-start.jsonl"]
    assert "exam after a: " in console(components)


def test_the_sampler_sleeps_while_the_policy_learns_from_demonstrations_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    components = make_components(tmp_path, make_stage("warm-up", 1, "sft"), examines=True)
    assert isinstance(components.sampler, BuiltinSampler)
    caches: list[object] = []
    advance = components.learner.advance

    def spy(*given: Any) -> Any:
        caches.append(components.sampler._decoder)  # type: ignore[attr-defined]
        return advance(*given)

    monkeypatch.setattr(components.learner, "advance", spy)
    train(components, RunState())
    assert source_of(components).graded[0][0] == "start" and caches == [None]


# -- groups without variance
def undecided_on_one_and_two(prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
    return [0.5 if p.payload in ("one", "two") else float(i % 2) for i, p in enumerate(prompts)]


def learned_ids(components: Components, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Filled as the run goes: of each step the prompts whose groups were packed, in order."""
    seen: list[list[int]] = []

    def spy(groups: Sequence[Group], **options: Any) -> list[Update]:
        seen.append([g.prompt.prompt_id for g in groups])
        return pack(groups, **options)

    monkeypatch.setattr("isomorph.engine.loop.pack", spy)
    return seen


@pytest.mark.parametrize(
    ("refills", "learned", "drawn", "flat"),
    [
        (0, [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]], [6, 6], [2, 2]),
        (1, [[6, 7, 2, 3, 4, 5], [8, 9, 10, 11, 14, 15]], [8, 8], [4, 2]),
        (3, [[8, 9, 2, 3, 4, 5], [10, 11, 16, 17, 14, 15]], [10, 8], [4, 2]),
    ],
)
def test_groups_without_variance_give_way_to_further_prompts_so_often_and_are_counted(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    refills: int,
    learned: list[list[int]],
    drawn: list[int],
    flat: list[int],
) -> None:
    components = make_components(tmp_path, make_stage(steps=2, refills=refills), judge=undecided_on_one_and_two)
    seen = learned_ids(components, monkeypatch)
    state = train(components, RunState())
    assert seen == learned  # words of number 0, 1, 6, 7, 12, 13 are "one" and "two"
    rows = read_steps(tmp_path)
    assert [row["groups/all"] for row in rows] == drawn
    assert [row["groups/refilled"] for row in rows] == [n - 6 for n in drawn]
    assert [row["groups/flat"] for row in rows] == flat
    assert [[g.prompt.prompt_id for g in groups] for groups in source_of(components).observed] == [
        list(range(drawn[0])),
        list(range(drawn[0], sum(drawn))),
    ]
    assert state.source["next_id"] == sum(drawn)
    assert state.totals["response_tok"] == sum(row["tok/response"] for row in rows)


@pytest.mark.parametrize("refills", [0, 1, 3])
def test_surprise_allows_for_each_group_that_is_left_out_for_its_rewards(tmp_path: Path, refills: int) -> None:
    stage = make_stage(steps=1, refills=refills)
    state = train(make_components(tmp_path, stage, judge=undecided_on_one_and_two), RunState())
    (row,) = read_steps(tmp_path)
    surprise = {name: state.totals[f"surprise/{name}"] for name in ("variance", "slack")}
    assert surprise["slack"] ** 2 / surprise["variance"] == pytest.approx(row["groups/flat"], rel=1e-3)


def test_advantages_over_the_whole_batch_are_those_of_the_groups_that_are_learned_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choices = dict(baseline="mean", scale="batch")
    components = make_components(
        tmp_path, make_stage(steps=1, refills=2, objective_choices=choices), judge=undecided_on_one_and_two
    )
    packed: list[Group] = []

    def spy(groups: Sequence[Group], **options: Any) -> list[Update]:
        packed.extend(groups)
        return pack(groups, **options)

    monkeypatch.setattr("isomorph.engine.loop.pack", spy)
    train(components, RunState())
    assert len(packed) == 6
    lens = torch.tensor([len(r.token_ids) for group in packed for r in group.rollouts])
    tokens = torch.tensor([i % 2 - 0.5 for i in range(48)], dtype=torch.float64).repeat_interleave(lens)
    for group in packed:
        truth = [(i % 2 - 0.5 - tokens.mean()) / tokens.std() for i in range(8)]
        assert group.advantages == pytest.approx([float(t) for t in truth], rel=1e-5)


# -- checkpoints, stopping, resuming
def test_a_checkpoint_falls_every_so_many_steps_and_at_the_end(tmp_path: Path) -> None:
    components = make_components(tmp_path, make_stage(steps=5), checkpoint_every=2, keep_checkpoints=9, examines=True)
    train(components, RunState())
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-00000002", "step-00000004", "step-00000005"]
    state, weights, _ = load_checkpoint(tmp_path / "checkpoints" / "step-00000005")
    assert weights_sha256(weights) == sha(components)
    assert state.source == json.loads(json.dumps(source_of(components).state_dict()))  # the last exam's result included


@pytest.mark.parametrize("asked", [1, 2, 3, 5, 20, 40])
def test_a_requested_stop_leaves_a_checkpoint_whenever_it_comes(tmp_path: Path, asked: int) -> None:
    """``asked``: the request is there from that question on."""
    questions: list[int] = []

    def stop_requested() -> bool:
        questions.append(1)
        return len(questions) >= asked

    components = make_components(tmp_path, make_stage(steps=9), stop_requested=stop_requested, checkpoint_every=100)
    with pytest.raises(KeyboardInterrupt):
        train(components, RunState())
    newest = latest_checkpoint(tmp_path / "checkpoints")
    assert newest is not None
    state, weights, _ = load_checkpoint(newest)
    assert state.step == _num_rows(tmp_path) == state.source["steps_done"]
    assert weights_sha256(weights) == sha(components)
    assert len(questions) == asked  # nothing is drawn, judged or learned once it was heard


STAGES = (
    make_stage("a", 3, "sft"),
    make_stage("b", 3, objective_choices=dict(kl_coef=0.05)),
    make_stage(
        "c", 3, "grpo", objective_choices=dict(kl_coef=0.05), optimizer_state="carry", reference="previous", refills=2
    ),
)


def gold_but_for_one(prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
    """Has groups without variance."""
    return [0.5 if p.payload == "one" else r for p, r in zip(prompts, gold(prompts, texts), strict=True)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> str:
    components = make_components(tmp_path_factory.mktemp("whole"), *STAGES, judge=gold_but_for_one, examines=True)
    train(components, RunState())
    return sha(components)


@pytest.mark.parametrize("stop_after", [1, 3, 8, 9])
def test_a_stopped_run_that_is_resumed_ends_bit_equal_to_one_that_was_not(
    tmp_path: Path, whole: str, stop_after: int
) -> None:
    stop_requested = _after(tmp_path, stop_after)
    first = make_components(tmp_path, *STAGES, judge=gold_but_for_one, examines=True, stop_requested=stop_requested)
    with pytest.raises(KeyboardInterrupt):
        train(first, RunState())
    second = make_components(tmp_path, *STAGES, judge=gold_but_for_one, examines=True)
    newest = latest_checkpoint(tmp_path / "checkpoints")
    assert newest is not None
    state, weights, tensors = load_checkpoint(newest)
    assert state.step == stop_after
    second.policy.overwrite([weights[name] for name in second.policy.named_parameters()])
    second.source.load_state_dict(state.source)
    second.learner.restore(next(s for s in STAGES if s.name == state.stage), tensors)
    assert train(second, state).step == 9
    assert sum(row["groups/refilled"] for row in read_steps(tmp_path)[-3:]) > 0
    assert sha(second) == whole
    assert [row["step"] for row in read_steps(tmp_path)] == list(range(1, 10))
    assert all(row["surprise/z"] is not None for row in read_steps(tmp_path)[-3:])
    assert [label for label, _ in source_of(second).graded] == ["start", "a", "b", "c"]


def _after(folder: Path, num_steps: int) -> Callable[[], bool]:
    return lambda: _num_rows(folder) >= num_steps


def _num_rows(folder: Path) -> int:
    return len(read_steps(folder)) if (folder / "steps.jsonl").exists() else 0


# three updates on each draw, twice; of the last stage's flat groups some are drawn anew
MANY = [
    stage.model_copy(update={"batch": stage.batch.model_copy(update={"prompts_per_update": 2, "num_iterations": 2})})
    for stage in (
        make_stage("a", 1, "sft"),
        make_stage(
            "b", 2, objective_choices=dict(kl_coef=0.05, reward_kl_coef=0.05, importance_sampling="token"), refills=2
        ),
    )
]


STRIDE = 5  # of about a hundred moments in which a run may be interrupted


def run_many(folder: Path, stops_at: int) -> tuple[Components, int]:
    """Stopped at the question ``stops_at``, resumed where that ends it early; and how many questions there were."""
    questions: list[int] = []

    def stop_requested() -> bool:
        questions.append(1)
        return len(questions) == stops_at

    components = make_components(folder, *MANY, judge=gold_but_for_one, examines=True, stop_requested=stop_requested)
    try:
        train(components, RunState())
        return components, len(questions)
    except KeyboardInterrupt:
        newest = latest_checkpoint(folder / "checkpoints")
        assert newest is not None
        state, weights, tensors = load_checkpoint(newest)
    components = make_components(folder, *MANY, judge=gold_but_for_one, examines=True)
    components.policy.overwrite([weights[name] for name in components.policy.named_parameters()])
    components.source.load_state_dict(state.source)
    if state.stage:
        components.learner.restore(next(s for s in MANY if s.name == state.stage), tensors)
    train(components, state)
    return components, len(questions)


def test_a_step_interrupted_anywhere_is_taken_up_bit_for_bit(tmp_path: Path) -> None:
    def told(folder: Path) -> list[dict[str, Any]]:
        timeless = ("time/", "mem/", "publish/", "wall_s")
        return [{k: v for k, v in row.items() if not k.startswith(timeless)} for row in read_steps(folder)]

    whole, num_questions = run_many(tmp_path / "whole", 0)
    assert num_questions > 90  # every token of a draw and of an exam, every micro-batch, and between them
    for stops_at in range(1, num_questions, STRIDE):
        folder = tmp_path / str(stops_at)
        components, asked = run_many(folder, stops_at)
        assert asked == stops_at
        assert sha(components) == sha(whole), stops_at
        assert told(folder) == told(tmp_path / "whole"), stops_at
        assert source_of(components).state_dict() == source_of(whole).state_dict()


def test_what_was_drawn_is_not_drawn_again_after_an_interruption(tmp_path: Path) -> None:
    class Counting(BuiltinSampler):
        calls = 0

        def generate(self, *given: Any) -> list[Rollout]:
            drawn = super().generate(*given)
            Counting.calls += len(given[0]) > 1  # a probe is one prompt
            return drawn

    def components_of(is_stopping: bool) -> Components:
        stage, sampler_of = make_stage(steps=1), lambda policy: Counting(policy, SamplerConfig())
        return make_components(
            tmp_path, stage, sampler_of=sampler_of, stop_requested=lambda: is_stopping and Counting.calls > 0
        )

    with pytest.raises(KeyboardInterrupt):
        train(components_of(True), RunState())
    newest = latest_checkpoint(tmp_path / "checkpoints")
    assert newest is not None
    for is_stopping in (True, False):  # asked to stop at once, again: nothing is lost
        state, _, tensors = load_checkpoint(newest)
        assert state.step == 0 and len(state.draws) == 1 and Counting.calls == 1
        components = components_of(is_stopping)
        components.source.load_state_dict(state.source)
        components.learner.restore(make_stage(steps=1), tensors)
        assert state.stage == "words"
        with pytest.raises(KeyboardInterrupt) if is_stopping else contextlib.nullcontext():
            train(components, state)
    assert Counting.calls == 1


# -- memory
class Forgetful(Questions):
    """Keeps nothing of what it was shown; looks at what lives at the beginning of some steps."""

    held: dict[int, tuple[int, int, int]]

    def observe(self, groups: Sequence[Group]) -> None:
        super().observe(groups)
        self.observed.clear()

    def stage_step(self) -> int:
        if self.steps_done in (100, 299):
            gc.collect()
            num_tensors = sum(type(thing) in (Tensor, torch.nn.Parameter) for thing in gc.get_objects())
            self.held[self.steps_done] = num_tensors, len(os.listdir("/proc/self/fd")), threading.active_count()
        return super().stage_step()


@pytest.mark.slow
def test_three_hundred_steps_hold_on_to_nothing(tmp_path: Path) -> None:
    stage = make_stage(steps=300, objective="grpo", objective_choices=dict(kl_coef=0.01), refills=1)
    components = make_components(tmp_path, stage, judge=gold_but_for_one, checkpoint_every=50)
    source = Forgetful(components.policy, stage)
    source.held = {}
    train(dataclasses.replace(components, source=source), RunState())
    assert source.held[299] == source.held[100]
    assert components.log.telemetry.growth.num_alarms == 0
    rss = [row["mem/rss_gib"] for row in read_steps(tmp_path)]
    assert min(rss[280:]) < min(rss[80:100]) * (
        1 + 2 * MIN_GROWTH
    )  # what the alarm calls growth, from window to window


# -- what ends a run
def test_a_judge_that_returns_the_wrong_number_of_rewards_ends_the_run(tmp_path: Path) -> None:
    components = make_components(tmp_path, make_stage(), judge=lambda prompts, texts: gold(prompts, texts)[1:])
    with pytest.raises(RunFailed, match="one reward for each response"):
        train(components, RunState())


def test_an_exams_judge_that_returns_the_wrong_number_of_rewards_ends_the_run(tmp_path: Path) -> None:
    components = make_components(tmp_path, make_stage(), judge=lambda prompts, texts: [], examines=True)
    with pytest.raises(RunFailed, match="one reward for each response"):
        train(components, RunState())


class Stale:
    """Says that it publishes, and samples from the weights of the beginning."""

    def __init__(self, policy: Policy) -> None:
        self.frozen = make_policy()
        self.inner = BuiltinSampler(self.frozen, SamplerConfig())
        self.policy_version = 0
        self.generate, self.asleep = self.inner.generate, self.inner.asleep

    def publish(self, version: int) -> Publication:
        self.policy_version = version
        return self.inner.publish(version)


def test_a_sampler_with_stale_weights_ends_the_run_before_anything_is_learned_from_it(tmp_path: Path) -> None:
    asked: list[int] = []

    def judge(prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
        asked.append(len(texts))
        return gold(prompts, texts)

    components = make_components(tmp_path, make_stage(), sampler_of=Stale, judge=judge, checkpoint_every=1)
    with pytest.raises(RunFailed, match="differ by"):
        train(components, RunState())
    assert sum(asked) == 2 * 48  # the first step's are of the weights of the beginning
    _, weights, _ = load_checkpoint(tmp_path / "checkpoints" / "step-00000001")
    assert sha(components) == weights_sha256(weights)  # the second step's moved nothing


def test_a_sampler_that_starts_with_other_weights_ends_the_run_before_it_is_asked(tmp_path: Path) -> None:
    asked: list[int] = []

    def judge(prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
        asked.append(len(texts))
        return gold(prompts, texts)

    def other_weights(policy: Policy) -> Stale:
        sampler = Stale(policy)
        with torch.no_grad():
            sampler.frozen.unembedding.mul_(1.5)
        return sampler

    components = make_components(tmp_path, make_stage(), sampler_of=other_weights, judge=judge)
    with pytest.raises(RunFailed, match="differ by"):
        train(components, RunState())
    assert asked == []


class Drifting(BuiltinSampler):
    """Tells the truth of a probe, which is one prompt, and overstates what it draws for a step."""

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, *given: Any) -> list[Rollout]:
        rollouts = super().generate(prompts, sampling, *given)
        if len(prompts) == 1:
            return rollouts
        assert all(r.sampler_logprob is not None for r in rollouts)
        return [dataclasses.replace(r, sampler_logprob=r.sampler_logprob + 0.01) for r in rollouts]  # type: ignore[operator]


def test_drift_beyond_what_the_run_allows_ends_it(tmp_path: Path) -> None:
    components = make_components(tmp_path, make_stage(), sampler_of=lambda policy: Drifting(policy, SamplerConfig()))
    with pytest.raises(RunFailed, match="differ by 1.00e-02"):
        train(components, RunState())
    assert not (tmp_path / "steps.jsonl").exists()


class Untrue(BuiltinSampler):
    """Draws at half the temperature for which it reports log-probabilities; a probe it answers truly."""

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, *given: Any) -> list[Rollout]:
        if len(prompts) == 1:
            return super().generate(prompts, sampling, *given)
        rollouts = super().generate(prompts, dataclasses.replace(sampling, temperature=0.5), *given)
        told = trainer_logprob(self.policy, prompts, rollouts, temperature=1.0)
        return [dataclasses.replace(r, sampler_logprob=q) for r, q in zip(rollouts, told, strict=True)]


def test_drawing_from_another_distribution_than_is_reported_ends_the_run(tmp_path: Path) -> None:
    def untrue(policy: Policy) -> Untrue:
        with torch.no_grad():
            policy.unembedding.mul_(4)  # as wide as a language model's logits
        return Untrue(policy, SamplerConfig())

    components = make_components(tmp_path, make_stage(objective_choices=dict(kl_coef=1e-3)), sampler_of=untrue)
    with pytest.raises(RunFailed, match="another distribution than it reports"):
        train(components, RunState())
    rows = read_steps(tmp_path)
    assert rows and all(-row["surprise/limit"] <= row["surprise/z"] < 0 for row in rows)
    assert max(row["drift/p999"] for row in rows) < 1e-5  # there is no drift to see it by


class Dropping(BuiltinSampler):
    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, *given: Any) -> list[Rollout]:
        rollouts = super().generate(prompts, sampling, *given)
        return [r if len(r.token_ids) == 1 else without_stop_token(r) for r in rollouts]


def without_stop_token(rollout: Rollout) -> Rollout:
    n = len(rollout.token_ids) - (rollout.finish == "stop")
    assert rollout.sampler_logprob is not None
    return dataclasses.replace(rollout, token_ids=rollout.token_ids[:n], sampler_logprob=rollout.sampler_logprob[:n])


def test_dropped_stop_tokens_end_the_run(tmp_path: Path) -> None:
    components = make_components(tmp_path, make_stage(), sampler_of=lambda policy: Dropping(policy, SamplerConfig()))
    with pytest.raises(RunFailed, match="drops stop tokens"):
        train(components, RunState())


def test_a_step_without_any_gradient_moves_nothing_and_publishes_nothing(tmp_path: Path) -> None:
    components = make_components(tmp_path, make_stage(steps=2), judge=lambda prompts, texts: [0.5] * len(texts))
    before = sha(components)
    state = train(components, RunState())
    assert sha(components) == before
    assert (state.step, state.num_updates, state.policy_version) == (2, 0, 0)
    rows = read_steps(tmp_path)
    assert [(row["groups/flat"], row["updates"], row["loss"], row["publish/bytes"]) for row in rows] == [
        (6, 0, None, None)
    ] * 2


# -- what a run that fails leaves
def resumed(folder: Path, stage: Stage, **options: Any) -> tuple[Components, RunState]:
    components = make_components(folder, stage, **options)
    newest = latest_checkpoint(folder / "checkpoints")
    assert newest is not None
    state, weights, tensors = load_checkpoint(newest)
    components.policy.overwrite([weights[name] for name in components.policy.named_parameters()])
    components.source.load_state_dict(state.source)
    components.learner.restore(stage, tensors)
    return components, state


class Failing:
    """Raises ``error`` at its call number ``at``, once; before and afterwards ``function``."""

    def __init__(self, function: Callable[..., Any], at: int, error: Exception) -> None:
        self.function, self.at, self.error, self.calls = function, at, error, 0

    def __call__(self, *given: Any, **named: Any) -> Any:
        self.calls += 1
        if self.calls == self.at:
            raise self.error
        return self.function(*given, **named)


FEW = make_stage(steps=4, objective="grpo")
FEW_UPDATES = FEW.model_copy(update={"batch": FEW.batch.model_copy(update={"prompts_per_update": 2})})
OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nMore of it")


def failing_in_the_third_step(components: Components, error: Exception) -> Callable[..., list[float]]:
    def judge(prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
        if len(source_of(components).observed) == 2:
            raise error
        return gold(prompts, texts)

    return judge


@pytest.mark.parametrize("place", ["generate", "judge", "pack", "third micro-batch", "gradient", "step", "record"])
def test_a_run_that_fails_goes_on_from_its_last_whole_step_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """Only while an update is being written into the weights there is nothing to keep."""
    train(whole := make_components(tmp_path / "whole", FEW_UPDATES, checkpoint_every=100), RunState())
    error = {"gradient": RunFailed("the gradient's norm is inf")}.get(place, OUT_OF_MEMORY)
    components = make_components(tmp_path / "run", FEW_UPDATES, checkpoint_every=100)
    learner, updates_before = components.learner, 2 * 3
    if place == "judge":
        components = dataclasses.replace(components, judge=failing_in_the_third_step(components, error))
    elif place == "generate":
        monkeypatch.setattr(
            components.sampler, "generate", Failing(components.sampler.generate, 1 + 3, error)
        )  # the probe, too
    elif place == "pack":
        monkeypatch.setattr("isomorph.engine.loop.pack", Failing(pack, 3, error))
    elif place == "third micro-batch":
        batches: list[int] = []
        backward = learner._backward

        def spy(*given: Any) -> Tensor:
            batches.append(len(source_of(components).observed))
            if batches.count(2) == 3:  # in the third step
                raise error
            return backward(*given)

        monkeypatch.setattr(learner, "_backward", spy)
    elif place in ("gradient", "step"):
        enter = learner.enter

        def enter_and_fail(stage: Stage) -> None:
            enter(stage)
            assert learner.optimizer is not None
            inner: Any = learner.optimizer if place == "gradient" else learner.optimizer.adamw
            monkeypatch.setattr(inner, "step", Failing(inner.step, updates_before + 2, error))

        monkeypatch.setattr(learner, "enter", enter_and_fail)
    elif place == "record":
        monkeypatch.setattr(components.log, "write_step", Failing(components.log.write_step, 3, error))
    with pytest.raises(RunFailed) as failed:
        train(components, RunState())
    told = str(failed.value)
    if place == "step":
        assert "no checkpoint was written, because the weights are ahead of the last whole step" in told
        assert latest_checkpoint(tmp_path / "run" / "checkpoints") is None
        return
    assert "has been written" in told and f"isomorph train --resume {tmp_path / 'run'}" in told
    assert ("out of memory (CUDA out of memory. Tried to allocate 20.00 MiB.)" in told) == (place != "gradient")
    again, state = resumed(tmp_path / "run", FEW_UPDATES)
    assert state.step == (3 if place == "record" else 2)
    assert bool(state.draws) == again.learner.is_within_round == (place in ("gradient", "third micro-batch"))
    assert train(again, state).step == 4
    assert sha(again) == sha(whole)


def test_a_defect_keeps_its_traceback_and_the_log_says_what_was_kept(tmp_path: Path) -> None:
    components = make_components(tmp_path, FEW, checkpoint_every=100)
    components = dataclasses.replace(components, judge=failing_in_the_third_step(components, KeyError("a defect")))
    with pytest.raises(KeyError, match="a defect"):
        train(components, RunState())
    assert "a checkpoint after step 2 has been written" in console(components)


def test_weights_that_are_not_finite_do_not_become_the_newest_checkpoint(tmp_path: Path) -> None:
    components = make_components(tmp_path, FEW, checkpoint_every=2, keep_checkpoints=1)

    def judge(prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
        if len(source_of(components).observed) == 3:
            with torch.no_grad():
                components.policy.unembedding[0] = torch.nan
        return gold(prompts, texts)

    components = dataclasses.replace(components, judge=judge)
    with pytest.raises(RunFailed, match="holds numbers that are not finite"):
        train(components, RunState())
    newest = latest_checkpoint(tmp_path / "checkpoints")
    assert newest is not None and newest.name == "step-00000002"


def test_a_stop_does_not_wait_for_the_judge(tmp_path: Path) -> None:
    asked, may_end = threading.Event(), threading.Event()

    def slow(prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
        asked.set()
        may_end.wait(60)
        return gold(prompts, texts)

    components = make_components(tmp_path, FEW, judge=slow, stop_requested=asked.is_set)
    try:
        with pytest.raises(KeyboardInterrupt):
            train(components, RunState())
        assert not may_end.is_set() and latest_checkpoint(tmp_path / "checkpoints") is not None
    finally:
        may_end.set()
