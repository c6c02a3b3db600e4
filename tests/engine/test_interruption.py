"""A run that is stopped, anywhere, leaves a checkpoint, and goes on from it bit for bit."""

import contextlib
import json
import signal
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import killed_while_writing
import pytest
from kill_timer import Moment
from killed_run import STAGES, found, trained_apart
from small_world import one_thread  # noqa: F401
from toy_run import Questions, gold, gold_but_for_one, make_components, make_stage, resumed, sha, source_of

from isomorph.engine import loop
from isomorph.engine.components import Components
from isomorph.engine.config import (
    SamplerConfig,
)
from isomorph.engine.loop import train
from isomorph.engine.record.best import read_best
from isomorph.engine.record.checkpoint import latest_checkpoint, load_checkpoint, weights_sha256
from isomorph.engine.record.runlog import locked, read_steps
from isomorph.engine.rollout.builtin import BuiltinSampler
from isomorph.engine.types import EvaluationRecord, Prompt, Rollout, RunFailed, RunState


def test_a_checkpoint_falls_every_so_many_steps_and_at_the_end(tmp_path: Path) -> None:
    components = make_components(tmp_path, make_stage(steps=5), checkpoint_every=2, keep_checkpoints=9, evaluates=True)
    train(components, RunState())
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == ["stage-words", "step-00000002", "step-00000004", "step-00000005"]
    state, weights, _ = load_checkpoint(tmp_path / "checkpoints" / "step-00000005")
    assert weights_sha256(weights) == sha(components)
    assert state.source == json.loads(json.dumps(source_of(components).state_dict()))  # with the last evaluation


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


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> str:
    components = make_components(tmp_path_factory.mktemp("whole"), *STAGES, judge=gold_but_for_one, evaluates=True)
    train(components, RunState())
    return sha(components)


@pytest.mark.parametrize("stop_after", [1, 3, 8, 9])
def test_a_stopped_run_that_is_resumed_ends_bit_equal_to_one_that_was_not(
    tmp_path: Path, whole: str, stop_after: int
) -> None:
    stop_requested = _after(tmp_path, stop_after)
    first = make_components(tmp_path, *STAGES, judge=gold_but_for_one, evaluates=True, stop_requested=stop_requested)
    with pytest.raises(KeyboardInterrupt):
        train(first, RunState())
    second = make_components(tmp_path, *STAGES, judge=gold_but_for_one, evaluates=True)
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


def test_the_checkpoint_of_a_stop_within_an_evaluation_stays_when_the_evaluation_is_made_at_last(
    tmp_path: Path,
) -> None:
    """Else a run that is killed after its resume has nothing to go on from."""
    stages, is_stopped = (make_stage("a", 2), make_stage("b", 2)), threading.Event()

    class Interrupted(BuiltinSampler):
        def generate(self, prompts: Sequence[Prompt], *others: Any) -> list[Rollout]:
            if prompts[0].prompt_id < 0 and _num_rows(tmp_path) == 2:  # the evaluation at the end of the first stage
                is_stopped.set()
            return super().generate(prompts, *others)

    first = make_components(
        tmp_path,
        *stages,
        evaluates=True,
        stop_requested=is_stopped.is_set,
        sampler_of=lambda policy: Interrupted(policy, SamplerConfig()),
    )
    with pytest.raises(KeyboardInterrupt):
        train(first, RunState())
    second, state = resumed(tmp_path, *stages, evaluates=True)
    assert state.step == 2 and len(source_of(second).graded) == 1

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    second.learner.begin = killed  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        train(second, state)
    third, state = resumed(tmp_path, *stages, evaluates=True)
    assert state.step == 2 and [label for label, _ in source_of(third).graded] == ["start", "a"]


@pytest.mark.parametrize("ending", ["stopped", "killed"])
def test_a_best_model_is_kept_by_the_resumed_run_where_the_one_before_had_no_time_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    """Its evaluation is not made again."""
    recorded = Questions.record_evaluation

    def with_score(source: Questions, *found: Any) -> EvaluationRecord:
        record = recorded(source, *found)
        return replace(record, best_by="toy", score=float(len(source.graded)))

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Questions, "record_evaluation", with_score)
    stages = (make_stage("a", 2), make_stage("b", 2))
    first = make_components(
        tmp_path,
        *stages,
        evaluates=True,
        stop_requested=lambda: ending == "stopped" and len(source_of(first).graded) == 2,
        checkpoint_every=2,
    )
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        if ending == "killed":  # after the checkpoint was written that has the evaluation, before best/ was
            patched.setattr(loop, "keep_copy", killed)
        train(first, RunState())
    assert read_best(tmp_path) == {"set": "toy", "label": "start", "step": 0, "score": 1.0}
    second, state = resumed(tmp_path, *stages, evaluates=True)
    assert [label for label, _ in source_of(second).graded] == ["start", "a"]
    monkeypatch.setattr(second.learner, "begin", killed)
    with pytest.raises(KeyboardInterrupt):
        train(second, state)
    assert read_best(tmp_path) == {"set": "toy", "label": "a", "step": 2, "score": 2.0}
    assert load_checkpoint(tmp_path / "best" / "checkpoint")[0].step == 2


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

    components = make_components(folder, *MANY, judge=gold_but_for_one, evaluates=True, stop_requested=stop_requested)
    try:
        train(components, RunState())
        return components, len(questions)
    except KeyboardInterrupt:
        newest = latest_checkpoint(folder / "checkpoints")
        assert newest is not None
        state, weights, tensors = load_checkpoint(newest)
    components = make_components(folder, *MANY, judge=gold_but_for_one, evaluates=True)
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
    assert num_questions > 90  # every token of a rollout and of an evaluation, every micro-batch, and between them
    for stops_at in range(1, num_questions, STRIDE):
        folder = tmp_path / str(stops_at)
        components, asked = run_many(folder, stops_at)
        assert asked == stops_at
        assert sha(components) == sha(whole), stops_at
        assert told(folder) == told(tmp_path / "whole"), stops_at
        assert source_of(components).state_dict() == source_of(whole).state_dict()


def test_rollouts_are_not_sampled_again_after_an_interruption(tmp_path: Path) -> None:
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


def test_a_stop_does_not_wait_for_the_reward_function(tmp_path: Path) -> None:
    asked, may_end = threading.Event(), threading.Event()

    def slow(prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
        asked.set()
        may_end.wait(60)
        return gold(prompts, texts)

    components = make_components(
        tmp_path, make_stage(steps=4, objective="grpo"), judge=slow, stop_requested=asked.is_set
    )
    try:
        with pytest.raises(KeyboardInterrupt):
            train(components, RunState())
        assert not may_end.is_set() and latest_checkpoint(tmp_path / "checkpoints") is not None
    finally:
        may_end.set()


def test_a_run_killed_while_a_checkpoint_is_written_resumes_from_the_one_before(tmp_path: Path) -> None:
    """More of them: python tests/engine/killed_while_writing.py 10."""
    assert killed_while_writing.count(tmp_path, 2) == 2


@pytest.fixture(scope="module")
def timed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nobody disturbs, with the seconds of its phases in times.json."""
    folder = tmp_path_factory.mktemp("timed")
    assert trained_apart(folder, None, folder / "times.json") == 0
    return folder


@pytest.mark.parametrize("phase", ["update", "exam", "write"])
def test_a_run_killed_at_a_random_moment_ends_bit_equal(tmp_path: Path, whole: str, timed: Path, phase: str) -> None:
    """Many more, of whole recipes, in every phase: python tests/engine/crash_anywhere.py --times 100."""
    seconds, random = json.loads((timed / "times.json").read_text())[phase], Random(phase)
    occurrence = random.randrange(len(seconds) - 1)  # not the last, so that the run is not over before
    moment = Moment(phase, occurrence, random.random() * min(seconds[occurrence], 0.02))
    assert trained_apart(tmp_path, moment) == -signal.SIGKILL
    with locked(tmp_path):  # at once
        components, state = found(tmp_path)
        train(components, state)
    assert sha(components) == whole
    untimed = ("time/", "mem/", "publish/", "wall_s")
    rows, wanted = (
        [{key: value for key, value in row.items() if not key.startswith(untimed)} for row in read_steps(folder)]
        for folder in (tmp_path, timed)
    )
    assert rows == wanted


def test_a_checkpoint_that_cannot_be_written_in_the_background_fails_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(root: Path, state: RunState, *_: Any, **__: Any) -> Path:
        raise RunFailed(f"no space for step {state.step}")

    components = make_components(tmp_path, make_stage(steps=9), checkpoint_every=4)
    monkeypatch.setattr(loop, "save_checkpoint", refuse)
    with pytest.raises(RunFailed, match="no space for step 4"):
        train(components, RunState())
