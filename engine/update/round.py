"""A round: the optimizer steps on one step's rollouts, how many of them are made, and what a checkpoint keeps of it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from isomorph.engine.config import Stage, UserError
from isomorph.engine.distributed.ranks import Ranks
from isomorph.engine.drift import DriftSums, step_drift
from isomorph.engine.types import StepDrift
from isomorph.engine.update.micro_batches import Update


@dataclass(slots=True)
class Tally:
    """Sums of metrics over the predicted tokens of a step, kept on the device until they are read."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    num_tok: int = 0

    def add(self, num_tok: int, **values: Tensor) -> None:
        self.num_tok += num_tok
        for name, value in values.items():
            total = value.detach().double().sum()
            self.sums[name] = self.sums[name] + total if name in self.sums else total

    def gather(self, ranks: Ranks) -> None:
        """Replaces the sums by those over all ranks. A collective: all ranks must call it."""
        counted = ranks.gather((self.num_tok, {name: total.item() for name, total in self.sums.items()}))
        self.num_tok = sum(num_tok for num_tok, _ in counted)
        for name in {name for _, sums in counted for name in sums}:
            self.sums[name] = torch.tensor(sum(sums.get(name, 0.0) for _, sums in counted), dtype=torch.float64)

    def mean(self, name: str) -> float:
        return self.sums[name].item() / self.num_tok if self.num_tok else float("nan")


class BatchLogprobs(NamedTuple):
    """Log-probability and entropy of N tokens, each [N], nats."""

    logprob: Tensor
    entropy: Tensor


class Round:
    """The optimizer steps on one step's rollouts: ``updates`` once for each of ``batch.num_iterations``."""

    def __init__(
        self,
        updates: list[Update],
        stage: Stage,
        stage_step: int,
        device: torch.device,
        check_drift: Callable[[StepDrift], None],
        num_replaced: int,
        known_drift: StepDrift | None = None,
    ) -> None:
        """``known_drift``: measured when the rollouts were drawn; None: on this round's own log-probabilities."""
        self.updates, self.stage, self.stage_step = updates, stage, stage_step
        self.trained = [update for update in updates if update.batches]
        self.check_drift, self.num_replaced, self.known_drift = check_drift, num_replaced, known_drift
        self.device = device
        self.reference: list[list[Tensor]] | None = None
        # old_logprob [N] of each update's batches, from before the first optimizer step; None: not computed yet
        self.old: list[list[Tensor] | None] = []
        self.advantage: list[list[Tensor]] | None = None  # [N] of each update's batches; set with reward_kl_coef
        self.tally, self.drift = Tally(), DriftSums(device)
        self.norms: list[float] = []  # gradient norm of each optimizer step made so far

    @property
    def is_done(self) -> bool:
        return len(self.norms) == self.stage.batch.num_iterations * len(self.trained)

    def add_mismatch(self, update: Update, logprobs: Sequence[BatchLogprobs]) -> None:
        """Accumulates the trainer-sampler log-probability mismatch on the tokens of ``update``, unless it is known."""
        if self.known_drift is not None:
            return
        for batch, (logprob, entropy) in zip(update.batches, logprobs, strict=True):
            if batch.sampler_logprob is not None:
                self.drift.add(logprob, batch.sampler_logprob, entropy)

    def step_drift(self, ranks: Ranks) -> StepDrift:
        """Returns the statistics of the mismatch, accumulated so far over all ranks, or known. A collective."""
        if self.known_drift is not None:
            return self.known_drift
        num_groups = self.num_replaced + sum(update.num_zero_advantage_groups for update in self.updates)
        return step_drift(
            ranks.gather(self.drift.tensors()),
            num_groups,
            sum(update.num_zero_advantage_seqs for update in self.updates),
        )

    def tensors(self) -> dict[str, Tensor]:
        """Returns the tensors that ``load`` needs to resume here; everything else is recomputed."""
        found = {"norms": torch.tensor(self.norms, dtype=torch.float64)}
        found |= {f"drift/{name}": tensor for name, tensor in self.drift.tensors().items()}
        found["tally/num_tok"] = torch.tensor(self.tally.num_tok)
        found |= {f"tally/sum/{name}": total.cpu() for name, total in self.tally.sums.items()}
        for u, logprobs in enumerate(self.old):
            found |= {f"old/{u}/{b}": logprob.cpu() for b, logprob in enumerate(logprobs or [])}
        for u, advantages in enumerate(self.advantage or []):
            found |= {f"advantage/{u}/{b}": advantage.cpu() for b, advantage in enumerate(advantages)}
        return found

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restores ``tensors()``. Raises UserError if an earlier version wrote them."""
        if "drift/sums" not in tensors:
            raise UserError(
                "this checkpoint was written within a step by an earlier version, whose log-probability mismatch has "
                "other statistics: resume with that version, or delete the checkpoint to resume from an earlier one"
            )
        self.norms = tensors["norms"].tolist()
        self.drift.load({name.removeprefix("drift/"): t for name, t in tensors.items() if name.startswith("drift/")})
        self.tally.num_tok = int(tensors["tally/num_tok"])
        named = {name: t for name, t in tensors.items() if name.startswith("tally/sum/")}
        self.tally.sums = {name.removeprefix("tally/sum/"): t.to(self.device) for name, t in named.items()}
        if self.stage.objective.old_logprob == "sampler":
            self.old = [None for _ in self.trained]
        else:
            self.old = self._of_batches("old", tensors)  # type: ignore[assignment]
        if self.stage.objective.reward_kl_coef:
            self.advantage = self._of_batches("advantage", tensors)

    def _of_batches(self, kind: str, tensors: Mapping[str, Tensor]) -> list[list[Tensor]]:
        return [
            [tensors[f"{kind}/{u}/{b}"].to(self.device) for b in range(len(update.batches))]
            for u, update in enumerate(self.trained)
        ]
