"""A whole run with real parts (decoder, built-in sampler, learner, disk), a toy reward and toy prompts."""

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

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
from isomorph.engine.model.load import build_tiny
from isomorph.engine.model.policy import Policy
from isomorph.engine.record.checkpoint import latest_checkpoint, load_checkpoint, weights_sha256
from isomorph.engine.record.runlog import RunLog
from isomorph.engine.rollout.builtin import BuiltinSampler
from isomorph.engine.rollout.demonstrations import DemonstrationSampler
from isomorph.engine.types import Answers, EvaluationRecord, EvaluationRequest, Group, Prompt, RunState
from isomorph.engine.update.learner import Learner

WORDS = ["ask", "gold", "lead", "iron", "tin", "zinc", "one", "two", "three", "four", "five", "six"]
QUESTIONS = ("one", "two", "three", "four", "five", "six")


class Questions:
    """Asks "ask <number>" over and over; after each stage an evaluation."""

    def __init__(self, policy: Policy, *stages: Stage, evaluates: bool = False) -> None:
        self.policy, self.stages, self.evaluates = policy, stages, evaluates
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

    def pending_samples(self) -> None:
        return None

    def record_samples(self, groups: Sequence[Group], texts: Sequence[str]) -> str:
        raise AssertionError("nothing was asked for")

    def step_values(self) -> dict[str, float | None]:
        return {}

    def observe(self, groups: Sequence[Group]) -> None:
        self.observed.append(list(groups))
        self.steps_done += 1
        stage = self.stage()
        assert stage is not None
        if self.steps_done == stage.steps:
            self.stage_index, self.steps_done = self.stage_index + 1, 0

    def pending_evaluation(self) -> EvaluationRequest | None:
        label = self.stages[self.stage_index - 1].name if self.stage_index else "start"
        if not self.evaluates or self.steps_done or label in {name for name, _ in self.graded}:
            return None
        return EvaluationRequest(label=label, prompts=tuple(self._prompt(-1 - i) for i in range(3)), max_new_tok=4)

    def record_evaluation(
        self, request: EvaluationRequest, greedy: Answers, sampled: Answers | None
    ) -> EvaluationRecord:
        self.found = greedy.found
        self.graded.append((request.label, list(greedy.rewards)))
        line = f"evaluation after {request.label}: {sum(greedy.rewards)}"
        return EvaluationRecord(line=line, values={"exam/toy/reward": sum(greedy.rewards) / len(greedy.rewards)})

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
    evaluates: bool = False,
    stop_requested: Callable[[], bool] = lambda: False,
    sampler_of: Callable[[Policy], Any] = lambda policy: BuiltinSampler(policy, SamplerConfig()),
    **run: Any,
) -> Components:
    folder.mkdir(exist_ok=True)
    policy = make_policy()
    source = Questions(policy, *stages, evaluates=evaluates)
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


def gold_but_for_one(prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
    """Has groups without variance."""
    return [0.5 if p.payload == "one" else r for p, r in zip(prompts, gold(prompts, texts), strict=True)]


def resumed(folder: Path, *stages: Stage, **options: Any) -> tuple[Components, RunState]:
    components = make_components(folder, *stages, **options)
    newest = latest_checkpoint(folder / "checkpoints")
    assert newest is not None
    state, weights, tensors = load_checkpoint(newest)
    components.policy.overwrite([weights[name] for name in components.policy.named_parameters()])
    components.source.load_state_dict(state.source)
    components.learner.restore(next(stage for stage in stages if stage.name == state.stage), tensors)
    return components, state
