"""Packed rollouts -> gradient -> step.

An optimizer step goes through its micro-batches one after the other; every one adds its share of a single loss, whose
denominator was counted over all of them before. Log-probabilities of the old policy get a pass of their own only where
the policy will have moved before: the first update of a round of rollouts sees them in its own forward pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from isomorph.engine.config import Stage
from isomorph.engine.policy import Policy
from isomorph.engine.types import PackedBatch, RunFailed, StepStats
from isomorph.engine.update.distributed import ALONE, Ranks, local, part_of, whole_of
from isomorph.engine.update.objective import Rows, loss_of_tokens, token_weight
from isomorph.engine.update.optimizer import MasterAdamW, learning_rate
from isomorph.engine.update.pack import Update
from isomorph.kernels.linear_logprob import TokenStats, linear_logprob, linear_loss

CPU_CHUNK_BYTES = 64 * 2**20  # of logits at a time: beyond it they leave the caches and only cost memory
CUDA_CHUNK_ROWS = 8192  # below it the weight gradient's read and write weigh more than its GEMM


@dataclass(slots=True)
class Tally:
    """Sums over the predicted tokens of a step, on the device until read."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    num_tok: int = 0

    def add(self, num_tok: int, **values: Tensor) -> None:
        self.num_tok += num_tok
        for name, value in values.items():
            total = value.detach().double().sum()
            self.sums[name] = self.sums[name] + total if name in self.sums else total

    def gather(self, ranks: Ranks) -> None:
        """Takes in what the other ranks have counted."""
        counted = ranks.gather((self.num_tok, {name: total.item() for name, total in self.sums.items()}))
        self.num_tok = sum(num_tok for num_tok, _ in counted)
        for name in {name for _, sums in counted for name in sums}:
            self.sums[name] = torch.tensor(sum(sums.get(name, 0.0) for _, sums in counted), dtype=torch.float64)

    def mean(self, name: str) -> float:
        return self.sums[name].item() / self.num_tok if self.num_tok else float("nan")


class Learner:
    """Owns the optimizer and the reference weights; everything else is handed in."""

    def __init__(self, policy: Policy, ranks: Ranks = ALONE) -> None:
        self.policy = policy
        self.ranks = ranks
        self.optimizer: MasterAdamW | None = None
        self.reference: list[Tensor] | None = None  # host memory; swapped in for one pass a rollout

    def enter(self, stage: Stage) -> None:
        """A new stage begins: its optimizer, and the policy that KL is measured to."""
        if self.optimizer is None:
            self._open_optimizer(stage)
        elif stage.optimizer == "reset":
            self.optimizer.reset(stage.optim)
        else:
            self.optimizer.configure(stage.optim)
        if stage.objective.kl_coef == 0:
            if stage.reference == "anchor":
                self.reference = None
        elif self.reference is None or stage.reference == "anchor":
            self.reference = self.policy.snapshot()

    def update(self, updates: Sequence[Update], stage: Stage, stage_step: int) -> StepStats:
        """All optimizer steps of one round of rollouts. Raises RunFailed on a non-finite loss or gradient."""
        assert self.optimizer is not None, "enter a stage first"
        lr = learning_rate(stage.optim, stage_step, stage.steps)
        learned = [update for update in updates if update.batches]
        reference = self._reference_logprobs([update.batches for update in learned], stage)
        # before anything moves; the first update sees its own
        old: list[list[Tensor] | None] = [None for _ in learned[:1]]
        old += [[self._logprob(batch, stage) for batch in update.batches] for update in learned[1:]]
        tally, drift, norms = Tally(), Tally(), []
        drift_max = torch.tensor(0.0, device=self.policy.device)
        for epoch in range(stage.batch.epochs):
            for u, update in enumerate(learned):
                before = old[u]
                seen = []
                for b, batch in enumerate(update.batches):
                    rows = self._rows(
                        batch, update, stage, before[b] if before else None, reference[u][b] if reference else None
                    )
                    seen.append(self._backward(batch, rows, stage, tally))
                if epoch == 0:
                    old[u] = before or seen
                    for batch, logprob in zip(update.batches, before or seen, strict=True):
                        if batch.sampler_logprob is not None and batch.num_loss_tok:
                            gap = (logprob - batch.sampler_logprob).abs()
                            drift.add(batch.num_loss_tok, drift=gap)
                            drift_max = torch.maximum(drift_max, gap.max())
                self.ranks.sum(self.optimizer.gradients())
                norms.append(self.optimizer.step(lr=lr, clip_norm=stage.optim.clip_norm))
                self.optimizer.zero_grad()
        tally.gather(self.ranks)
        drift.gather(self.ranks)
        num_own_tok = sum(len(b.token_ids) for u in updates for b in u.batches)
        nan = float("nan")
        return StepStats(
            loss=tally.sums["loss"].item() / len(norms) if norms else nan,
            grad_norm=sum(norms) / len(norms) if norms else nan,
            lr=lr,
            clip_frac=tally.mean("clipped"),
            entropy=tally.mean("entropy"),
            kl=tally.mean("kl"),
            drift_mean=drift.mean("drift"),
            drift_max=max(self.ranks.gather(drift_max.item())) if drift.num_tok else nan,
            num_updates=len(norms),
            num_loss_tok=sum(u.num_loss_tok for u in updates),
            num_trunk_tok=stage.batch.epochs * sum(self.ranks.gather(num_own_tok)),
            num_dropped_tok=sum(u.num_dropped_tok for u in updates),
        )

    def state_tensors(self) -> dict[str, Tensor]:
        """For a checkpoint: optimizer and reference."""
        assert self.optimizer is not None
        named = zip(self.policy.named_parameters().items(), self.reference or [], strict=False)
        reference = {f"reference/{name}": whole_of(weight, parameter) for (name, parameter), weight in named}
        return {**self.optimizer.state_tensors(), **reference}

    def restore(self, stage: Stage, tensors: dict[str, Tensor]) -> None:
        """Into the middle of ``stage``; the policy's parameters have been restored before."""
        self._open_optimizer(stage)
        assert self.optimizer is not None
        self.optimizer.load_state_tensors(tensors)
        named = {f"reference/{name}": p for name, p in self.policy.named_parameters().items()}
        is_there = all(name in tensors for name in named)
        self.reference = [local(part_of(tensors[name], p)).cpu() for name, p in named.items()] if is_there else None

    def _open_optimizer(self, stage: Stage) -> None:
        if self.optimizer is not None:
            self.optimizer.close()
        self.optimizer = MasterAdamW(self.policy.named_parameters(), stage.optim)

    def _rows(
        self, batch: PackedBatch, update: Update, stage: Stage, old: Tensor | None, reference: Tensor | None
    ) -> Rows:
        weight = token_weight(
            stage.objective,
            batch.seq_id,
            batch.num_seqs,
            num_loss_tok=update.num_loss_tok,
            num_step_seqs=update.num_seqs,
            max_new_tok=stage.sampling.max_new_tok,
            dtype=torch.promote_types(self.policy.dtype, torch.float32),
        )
        return Rows(
            weight=weight,
            advantage=batch.advantage[batch.seq_id],
            seq_id=batch.seq_id,
            old_logprob=old,
            ref_logprob=reference,
            sampler_logprob=batch.sampler_logprob,
        )

    def _backward(self, batch: PackedBatch, rows: Rows, stage: Stage, tally: Tally) -> Tensor:
        """Adds the micro-batch's gradient; returns the log-probabilities it saw, [N]."""
        seen: list[Tensor] = []

        def loss_of(stats: TokenStats, chunk: slice) -> Tensor:
            part = rows.slice(chunk)
            token = loss_of_tokens(stage.objective, stats, part)
            weighted = part.weight * token.loss
            seen.append(stats.logprob.detach())
            tally.add(len(part.weight), loss=weighted, clipped=token.is_clipped, entropy=stats.entropy, kl=token.kl)
            return weighted.sum()

        hidden_TD = self.policy.hidden(batch)
        head = (hidden_TD, self.policy.unembedding, batch.target_ids)
        row_index, temperature = batch.row_index, stage.sampling.temperature
        if stage.objective.is_per_token:
            chunk_rows = _chunk_rows(self.policy)
            loss = linear_loss(*head, loss_of, row_index_N=row_index, temperature=temperature, chunk_rows=chunk_rows)
        else:  # a token's coefficient depends on its whole sequence, so no chunk can be finished by itself
            stats = linear_logprob(*head, row_index_N=row_index, temperature=temperature)
            loss = loss_of(stats, slice(0, batch.num_loss_tok))
        loss.backward()
        logprob = torch.cat(seen) if seen else hidden_TD.new_empty(0)
        if not logprob.isfinite().all():
            raise RunFailed(
                f"{int((~logprob.isfinite()).sum())} of {len(logprob)} log-probabilities are not finite: the policy "
                f"has diverged; resume from an earlier checkpoint with a lower learning rate"
            )
        return logprob

    @torch.no_grad()
    def _logprob(self, batch: PackedBatch, stage: Stage) -> Tensor:
        return linear_logprob(
            self.policy.hidden(batch),
            self.policy.unembedding,
            batch.target_ids,
            row_index_N=batch.row_index,
            temperature=stage.sampling.temperature,
        ).logprob

    def _reference_logprobs(self, updates: Sequence[Sequence[PackedBatch]], stage: Stage) -> list[list[Tensor]] | None:
        if stage.objective.kl_coef == 0:
            return None
        assert self.reference is not None
        with self.policy.borrowed_weights(self.reference):
            return [[self._logprob(batch, stage) for batch in batches] for batches in updates]


def _chunk_rows(policy: Policy) -> int:
    if policy.device.type == "cuda":
        return CUDA_CHUNK_ROWS
    num_vocab = policy.unembedding.shape[0]
    return max(1, CPU_CHUNK_BYTES // (4 * num_vocab))
