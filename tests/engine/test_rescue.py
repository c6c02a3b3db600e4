"""A run that fails leaves a checkpoint of its last whole step, where its weights are sound."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from small_world import one_thread  # noqa: F401
from torch import Tensor
from toy_run import console, gold, make_components, make_stage, resumed, sha, source_of

from isomorph.engine.components import Components
from isomorph.engine.config import (
    Stage,
)
from isomorph.engine.loop import train
from isomorph.engine.record.checkpoint import latest_checkpoint
from isomorph.engine.types import Prompt, RunFailed, RunState
from isomorph.engine.update.micro_batches import pack


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
            if batches.count(3) == 3:  # in the third step, which the source has observed
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
