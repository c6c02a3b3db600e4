"""Optimizer steps on the packed rollouts of one step (a round).

    round = learner.begin(updates, stage, stage_step)      list[Update] -> Round
    while not round.is_done: learner.advance(round)        one optimizer step each
    learner.stats(round)                                   -> StepStats

An optimizer step runs its micro-batches one after the other. Each adds its part of one loss, whose denominator was
counted over all micro-batches and ranks before, so that the gradient does not depend on the split.

The first optimizer step of a round uses its own detached log-probabilities as old_logprob. For the later ones a forward
without gradient computes old_logprob before the first step. With reward_kl_coef, or where the loss has another
temperature than the sampler or is not over its kept tokens (rft), the first optimizer step needs that forward, too.
With objective.old_logprob = "sampler" no update needs it, and the mismatch with the sampler is measured on the tokens
of the first update alone.

Between two optimizer steps a round can be saved in a checkpoint and resumed bit for bit.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from isomorph.engine.config import Stage
from isomorph.engine.distributed.fsdp import discard_gradients, from_shard, local_shard, shard_like, sum_between_copies
from isomorph.engine.distributed.gradient_sum import GradientSum
from isomorph.engine.distributed.ranks import ALONE, Ranks
from isomorph.engine.model.policy import Policy
from isomorph.engine.model.scoring import batch_stats
from isomorph.engine.types import PackedBatch, RunFailed, StepDrift, StepStats
from isomorph.engine.update.advantage import penalised
from isomorph.engine.update.logits_chunk import logits_chunk_rows
from isomorph.engine.update.micro_batches import Update
from isomorph.engine.update.not_finite import origin_in_forward
from isomorph.engine.update.objective import LossFunction, TokenInputs, loss_of_tokens, token_weight
from isomorph.engine.update.optimizer import MasterAdamW, learning_rate
from isomorph.engine.update.round import BatchLogprobs, Round, Tally
from isomorph.kernels.bit_hash import bit_hash
from isomorph.kernels.linear_logprob import TokenStats, linear_logprob, linear_loss


class Learner:
    """Makes optimizer steps on ``policy``. Owns the optimizer, the reference weights and the current round."""

    def __init__(
        self,
        policy: Policy,
        ranks: Ranks = ALONE,
        *,
        optimizer_on_host: bool = False,
        loss_function: LossFunction = loss_of_tokens,
    ) -> None:
        """``loss_function``: of all stages. It gets a chunk of the tokens at a time where the stage's objective
        ``is_per_token``, else all tokens of a micro-batch, whole sequences.
        """
        self.policy = policy
        self.loss_function = loss_function
        self.ranks = ranks
        self.optimizer_on_host = optimizer_on_host
        self.optimizer: MasterAdamW | None = None
        self.gradient_sum: GradientSum | None = None  # of data parallel ranks, made with the first gradient
        self.reference: list[Tensor] | None = None  # weights of the KL reference, in host memory
        # the reference as it was taken: the list, and a hash of each tensor
        self._taken: tuple[list[Tensor], dict[str, int]] | None = None
        self.start: list[Tensor] | None = None  # weights at the start of the stage, in host memory, if it needs them
        self.round: Round | None = None  # None: between rounds
        self._interrupted: dict[str, Tensor] = {}  # tensors of the round that ``begin`` resumes
        self.on_batch: Callable[[], None] = lambda: None  # called before each micro-batch; what it raises ends the call
        self.is_writing_weights = False  # True while an optimizer step writes the weights

    def enter(self, stage: Stage) -> None:
        """Prepares a new stage: sets up or resets the optimizer, takes or keeps the snapshot of the KL reference."""
        self.start = None
        if self.optimizer is None:
            self._open_optimizer(stage)
        elif stage.optimizer_state == "reset":
            self.optimizer.reset(stage.optim)
        else:
            self.optimizer.configure(stage.optim)
        if not stage.objective.needs_reference:
            if stage.reference == "snapshot":
                self.reference = None
        elif self.reference is None or stage.reference == "snapshot":
            self._take_reference(self.policy.snapshot())
        else:
            self._refuse_moved_reference()

    def _take_reference(self, weights: list[Tensor] | None) -> None:
        self.reference = weights
        self._taken = None if weights is None else (weights, self._hashes(weights))

    def _refuse_moved_reference(self) -> None:
        """Raises RunFailed if a tensor of the KL reference has changed since it was taken: KL would be to nothing."""
        if self._taken is None or self.reference is not self._taken[0]:  # none, or set by a caller
            return
        weights, before = self._taken
        after = self._hashes(weights)
        if moved := [name for name in before if after[name] != before[name]]:
            raise RunFailed(
                f"the weights of the KL reference have changed since they were taken: {len(moved)} of {len(before)} "
                f"tensors, the first is {moved[0]}; the KL was to another policy than the recipe says: resume from an "
                "earlier checkpoint, and look for code that writes into the reference or shares its memory"
            )

    def _hashes(self, weights: Sequence[Tensor]) -> dict[str, int]:
        """A hash of the bits of each trained parameter's tensor in ``weights``."""
        return {
            name: int(bit_hash(weight).item())
            for name, weight in zip(self.policy.named_parameters(), weights, strict=True)
        }

    def restart(self, stage: Stage, *, from_start: bool) -> None:
        """Begins another round of SFT within ``stage``: moments are cleared.

        ``from_start``: weights are set to those at the start of the stage, which the first such call must find.
        """
        assert self.optimizer is not None, "enter a stage first"
        if not from_start:
            self.optimizer.reset(stage.optim)
            return
        if self.start is None:
            self.start = self.policy.snapshot()
        self.policy.overwrite(self.start)
        self._open_optimizer(stage)

    def update(self, updates: Sequence[Update], stage: Stage, stage_step: int) -> StepStats:
        """Makes all optimizer steps on one step's rollouts."""
        work = self.begin(updates, stage, stage_step)
        while not work.is_done:
            self.advance(work)
        return self.stats(work)

    def begin(
        self,
        updates: Sequence[Update],
        stage: Stage,
        stage_step: int,
        check_drift: Callable[[StepDrift], None] = lambda drift: None,
        num_replaced: int = 0,
        known_drift: StepDrift | None = None,
    ) -> Round:
        """Computes reference and old log-probabilities and returns the Round; after ``restore``, resumes the saved one.

        ``check_drift`` gets the trainer-sampler log-probability mismatch before the first optimizer step; if it
        raises, the weights are unchanged. ``num_replaced``: zero-variance groups that refills replaced by others.
        ``known_drift``: the mismatch, for rollouts that were drawn from older weights than the present ones, which must
        be learned from with objective.old_logprob = "sampler".
        """
        if known_drift is not None and stage.objective.old_logprob != "sampler":
            raise ValueError(
                'rollouts of older weights need objective.old_logprob = "sampler", or their weight would be missing in '
                f'the loss; got "{stage.objective.old_logprob}"'
            )
        work = Round(list(updates), stage, stage_step, self.policy.device, check_drift, num_replaced, known_drift)
        self.round = work
        work.reference = self._reference_logprobs([update.batches for update in work.trained], stage)
        if self._interrupted:
            work.load(self._interrupted)
            self._interrupted = {}
            return work
        # the first update computes its own in its forward, unless the loss is of another distribution than sampled
        num_own = 1 if stage.loss_is_as_sampled or stage.objective.is_supervised else 0
        if stage.objective.old_logprob == "sampler":
            num_own = len(work.trained)  # no update needs the trainer's
        work.old = [None for _ in work.trained[:num_own]]
        for update in work.trained[num_own:]:
            logprobs = [self._batch_logprobs(batch, stage) for batch in update.batches]
            work.old.append([logprob for logprob, _ in logprobs])
            work.add_mismatch(update, logprobs)
        if stage.objective.reward_kl_coef and work.trained:
            assert work.reference is not None
            old = self._old_logprobs(work, stage)
            work.advantage = penalised(work.trained, old, work.reference, stage.objective, self.ranks)
        return work

    def advance(self, work: Round) -> None:
        """Makes one optimizer step. Raises RunFailed on a non-finite log-probability or gradient.

        An exception before the optimizer writes weights leaves ``work`` as it was, so that a checkpoint can hold it.
        """
        assert self.optimizer is not None, "enter a stage first"
        tally = replace(work.tally, sums=dict(work.tally.sums))
        try:
            self._accumulate(work)
        except BaseException:
            work.tally = tally
            if self.gradient_sum is not None:
                self.gradient_sum.abandon()
            self.optimizer.zero_grad()
            discard_gradients(self.policy.model)
            raise
        lr = learning_rate(work.stage.optim, work.stage_step, work.stage.steps)
        self.is_writing_weights = True
        try:
            norm = self.optimizer.step(lr=lr, clip_norm=work.stage.optim.clip_norm)
        except RunFailed:  # the gradient is not finite; no weight has changed
            work.tally, self.is_writing_weights = tally, False
            raise
        self.optimizer.zero_grad()
        work.norms.append(norm)
        self.is_writing_weights = False

    def _old_logprobs(self, work: Round, stage: Stage) -> list[list[Tensor]]:
        """[N] of every micro-batch, from before the first optimizer step, by a forward where they are not known."""
        return [
            known if known is not None else [self._old_logprob(batch, stage) for batch in update.batches]
            for update, known in zip(work.trained, work.old, strict=True)
        ]

    def _old_logprob(self, batch: PackedBatch, stage: Stage) -> Tensor:
        if stage.objective.old_logprob == "trainer":
            return self._logprob(batch, stage)
        assert batch.sampler_logprob is not None
        return batch.sampler_logprob

    def _accumulate(self, work: Round) -> None:
        """Accumulates the gradient of the next update, summed over all ranks."""
        assert self.optimizer is not None
        is_first = not work.norms
        u = len(work.norms) % len(work.trained)
        update, before = work.trained[u], work.old[u]
        reference = work.reference[u] if work.reference else None
        logprobs = []
        gradient_sum = self._summed_over_ranks()
        if gradient_sum is not None:
            gradient_sum.begin()
        for b, batch in enumerate(update.batches):
            old = before[b] if before else None
            inputs = self._token_inputs(batch, update, work.stage, old, reference[b] if reference else None)
            if work.advantage is not None:
                inputs = replace(inputs, advantage=work.advantage[u][b])
            is_last = b == len(update.batches) - 1
            sum_between_copies(self.policy.model, is_last)
            if is_last:
                self.optimizer.last_batch()
                if gradient_sum is not None:
                    gradient_sum.last_batch()
            logprobs.append(self._backward(batch, inputs, work.stage, work.tally))
        if gradient_sum is not None:
            gradient_sum.launch_rest()
        if before is None and is_first:  # later the weights are no longer those that sampled
            work.add_mismatch(update, logprobs)
        if before is None and work.stage.objective.old_logprob == "trainer":
            work.old[u] = [logprob for logprob, _ in logprobs]
        if is_first:
            work.check_drift(work.step_drift(self.ranks))
        if gradient_sum is not None:
            gradient_sum.wait()

    def _summed_over_ranks(self) -> GradientSum | None:
        """None where nothing is summed here: one rank, or FSDP2. Its hooks come after the optimizer's."""
        if self.gradient_sum is None and self.ranks.size > 1 and not self.policy.is_sharded:
            assert self.optimizer is not None
            self.gradient_sum = GradientSum(self.optimizer.parameters, self.optimizer.masters)
        return self.gradient_sum

    @property
    def is_within_round(self) -> bool:
        """Some optimizer steps of a round have been made: the remaining ones need the same rollouts."""
        return bool(self._interrupted) or (self.round is not None and bool(self.round.norms))

    def stats(self, work: Round) -> StepStats:
        """Returns the metrics of a finished round, over all ranks. A collective: all ranks must call it."""
        self.round = None
        stage, norms, updates = work.stage, work.norms, work.updates
        work.tally.gather(self.ranks)
        num_own_tok = sum(len(b.token_ids) for u in updates for b in u.batches)
        nan = float("nan")
        return StepStats(
            loss=work.tally.sums["loss"].item() / len(norms) if norms else nan,
            grad_norm=sum(norms) / len(norms) if norms else nan,
            lr=learning_rate(stage.optim, work.stage_step, stage.steps),
            clip_frac=work.tally.mean("clipped"),
            entropy=work.tally.mean("entropy"),
            kl=work.tally.mean("kl"),
            drift=work.step_drift(self.ranks),
            num_updates=len(norms),
            num_loss_tok=sum(u.num_loss_tok for u in updates),
            num_forward_tok=stage.batch.num_iterations * sum(self.ranks.gather(num_own_tok)),
            num_dropped_tok=sum(u.num_dropped_tok for u in updates),
        )

    def state_tensors(self) -> dict[str, Tensor]:
        """Returns the tensors of optimizer.safetensors: optimizer state, KL reference and the current round.

        With FSDP DTensors, and of the round this rank's own tensors; else those of all ranks. A collective: all ranks
        must call it.
        """
        assert self.optimizer is not None
        self._refuse_moved_reference()
        under_way = self.round.tensors() if self.round is not None and self.round.norms else self._interrupted
        if self.policy.is_sharded:
            by_rank = {self.ranks.rank: under_way}
        else:
            by_rank = dict(enumerate(self.ranks.gather(under_way)))
        rounds = {
            f"round/{rank}/{name}": tensor for rank, tensors in by_rank.items() for name, tensor in tensors.items()
        }
        kept = {**self._kept("reference", self.reference), **self._kept("start", self.start)}
        return {**self.optimizer.state_tensors(), **kept, **rounds}

    def restore(self, stage: Stage, tensors: dict[str, Tensor]) -> None:
        """Restores ``state_tensors`` in the middle of ``stage``, after the policy's weights have been restored."""
        self._open_optimizer(stage)
        assert self.optimizer is not None
        self.optimizer.load_state_tensors(tensors)
        own = f"round/{self.ranks.rank}/"
        self._interrupted = {name.removeprefix(own): t for name, t in tensors.items() if name.startswith(own)}
        self._take_reference(self._found("reference", tensors))
        self.start = self._found("start", tensors)

    def _kept(self, kind: str, weights: Sequence[Tensor] | None) -> dict[str, Tensor]:
        """Weights in host memory as tensors of a checkpoint."""
        named = zip(self.policy.stored().items(), weights or [], strict=False)
        return {f"{kind}/{name}": from_shard(weight, parameter) for (name, parameter), weight in named}

    def _found(self, kind: str, tensors: dict[str, Tensor]) -> list[Tensor] | None:
        """The inverse of ``_kept``; None where the checkpoint has none."""
        named = {f"{kind}/{name}": p for name, p in self.policy.stored().items()}
        if not all(name in tensors for name in named):
            return None
        return [local_shard(shard_like(tensors[name], p)).cpu() for name, p in named.items()]

    def close(self) -> None:
        """Releases the policy's parameters, masters and moments: another learner can be made on this policy."""
        if self.gradient_sum is not None:
            self.gradient_sum.close()
            self.gradient_sum = None
        if self.optimizer is not None:
            self.optimizer.close()
            self.optimizer = None

    def _open_optimizer(self, stage: Stage) -> None:
        self.close()
        self.optimizer = MasterAdamW(self.policy.named_parameters(), stage.optim, on_host=self.optimizer_on_host)

    def _token_inputs(
        self, batch: PackedBatch, update: Update, stage: Stage, old: Tensor | None, reference: Tensor | None
    ) -> TokenInputs:
        weight = token_weight(
            stage.objective,
            batch.seq_id,
            batch.num_seqs,
            num_loss_tok=update.num_loss_tok,
            num_step_seqs=update.num_seqs,
            max_new_tok=stage.sampling.max_new_tok,
            dtype=torch.promote_types(self.policy.dtype, torch.float32),
        )
        return TokenInputs(
            weight=weight,
            advantage=batch.advantage[batch.seq_id],
            seq_id=batch.seq_id,
            old_logprob=old,
            ref_logprob=reference,
            sampler_logprob=batch.sampler_logprob,
        )

    def _backward(self, batch: PackedBatch, inputs: TokenInputs, stage: Stage, tally: Tally) -> BatchLogprobs:
        """Adds the micro-batch's gradient; returns log-probability and entropy of its N tokens, detached."""
        self.on_batch()
        chunks: list[BatchLogprobs] = []

        def loss_of(stats: TokenStats, chunk: slice) -> Tensor:
            part = inputs.slice(chunk)
            token = self.loss_function(stage.objective, stats, part)
            weighted = part.weight * token.loss
            chunks.append(BatchLogprobs(stats.logprob.detach(), stats.entropy.detach()))
            tally.add(len(part.weight), loss=weighted, clipped=token.is_clipped, entropy=stats.entropy, kl=token.kl)
            return weighted.sum()

        hidden_TD = self.policy.hidden(batch)
        head = (hidden_TD, self.policy.unembedding, batch.target_ids)
        row_index, temperature = batch.row_index, stage.loss_temperature
        kept = batch.kept if stage.loss_is_truncated else None
        if stage.objective.is_per_token:
            chunk_rows = logits_chunk_rows(len(self.policy.unembedding), is_gpu=self.policy.device.type == "cuda")
            loss = linear_loss(
                *head, loss_of, row_index_N=row_index, temperature=temperature, chunk_rows=chunk_rows, kept=kept
            )
        else:  # the loss of a token depends on its whole sequence, so it cannot be computed chunk by chunk
            stats = linear_logprob(*head, row_index_N=row_index, temperature=temperature, kept=kept)
            loss = loss_of(stats, slice(0, batch.num_loss_tok))
        loss.backward()
        logprob, entropy = (
            torch.cat(parts)
            for parts in zip(*(chunks or [BatchLogprobs(hidden_TD.new_empty(0), hidden_TD.new_empty(0))]), strict=True)
        )
        if not torch.stack([logprob.isfinite().all(), loss.detach().isfinite()]).all():  # one wait for the device
            raise self._not_finite(batch, logprob, loss)
        return BatchLogprobs(logprob, entropy)

    def _not_finite(self, batch: PackedBatch, logprob: Tensor, loss: Tensor) -> RunFailed:
        if not logprob.isfinite().all():
            return self._no_logprob(batch, logprob, "")
        largest = batch.advantage.abs().max().item()
        return RunFailed(
            f"the loss is {loss.item()}, and all {len(logprob)} log-probabilities are finite; the largest advantage is "
            f"{largest:.3g}: check the size of the rewards, and the loss function if it is your own"
        )

    def _no_logprob(self, batch: PackedBatch, logprob: Tensor, whose: str) -> RunFailed:
        num, origin = int((~logprob.isfinite()).sum()), origin_in_forward(self.policy, batch)
        return RunFailed(
            f"{num} of {len(logprob)} log-probabilities{whose} are not finite: {origin}; "
            "the policy has diverged: lower optim.lr and start again, or resume from an earlier checkpoint"
        )

    def _logprob(self, batch: PackedBatch, stage: Stage, whose: str = "") -> Tensor:
        return self._batch_logprobs(batch, stage, whose).logprob

    @torch.no_grad()
    def _batch_logprobs(self, batch: PackedBatch, stage: Stage, whose: str = "") -> BatchLogprobs:
        self.on_batch()
        stats = batch_stats(self.policy, batch, temperature=stage.sampling.temperature)
        if not stats.logprob.isfinite().all():
            raise self._no_logprob(batch, stats.logprob, whose)
        return BatchLogprobs(stats.logprob, stats.entropy)

    def _reference_logprobs(self, updates: Sequence[Sequence[PackedBatch]], stage: Stage) -> list[list[Tensor]] | None:
        if not stage.objective.needs_reference:
            return None
        assert self.reference is not None
        with self.policy.borrowed_weights(self.reference):
            whose = " of the KL reference"
            return [[self._logprob(batch, stage, whose) for batch in batches] for batches in updates]
