"""The built-in sampler with weights of its own: it can draw from older ones while the learner changes the policy's."""

from collections.abc import Sequence

import torch

from isomorph.engine.config import SamplerConfig, UserError
from isomorph.engine.drift import DriftSums
from isomorph.engine.model.policy import Policy
from isomorph.engine.model.scoring import trainer_stats
from isomorph.engine.rollout.builtin import BuiltinSampler
from isomorph.engine.rollout.fingerprint import fingerprint
from isomorph.engine.types import Prompt, Publication, Rollout


class SamplerApart(BuiltinSampler):
    """Samples from a copy of ``policy``'s weights, which ``publish`` renews.

    Raises UserError on a GPU, where drawing and learning would take turns on one stream, and the CUDA graphs of one
    would be recorded while the other allocates.
    """

    def __init__(self, policy: Policy, config: SamplerConfig) -> None:
        if policy.device.type != "cpu":
            raise UserError(
                f"sampler.overlap = true is supported on the CPU only, this model is on {policy.device.type}: remove "
                "sampler.overlap"
            )
        super().__init__(policy.twin(), config)
        self.trainer = policy

    @torch.no_grad()
    def publish(self, version: int) -> Publication:
        """Copies the policy's present weights, as ``version``."""
        own, theirs = self.policy.named_parameters(), self.trainer.named_parameters()
        for name, weight in own.items():
            weight.copy_(theirs[name])
        self.policy_version = version
        num_bytes = sum(weight.nbytes for weight in own.values())
        return Publication(version=version, num_bytes=num_bytes, fingerprint=fingerprint(self.policy.weights()))

    def drift(
        self, prompts: Sequence[Prompt], rollouts: Sequence[Rollout], *, temperature: float, batch_tok: int
    ) -> DriftSums:
        """Mismatch between the trainer's pass and what was reported, both with the weights that were drawn from.

        ``rollouts``: the same number for each of ``prompts``, in their order. ``batch_tok``: packed tokens of a pass,
        unless a single group has more.
        """
        sums, size = DriftSums(self.policy.device), len(rollouts) // max(1, len(prompts))
        groups = [(prompt, rollouts[i * size : (i + 1) * size]) for i, prompt in enumerate(prompts)]
        batch: list[tuple[Prompt, Sequence[Rollout]]] = []
        for i, group in enumerate(groups):
            batch.append(group)
            if i + 1 == len(groups) or _num_tok([*batch, groups[i + 1]]) > batch_tok:
                self._measure(batch, sums, temperature)
                batch = []
        return sums

    def _measure(self, groups: Sequence[tuple[Prompt, Sequence[Rollout]]], sums: DriftSums, temperature: float) -> None:
        rollouts = [rollout for _, of_prompt in groups for rollout in of_prompt]
        trainer = trainer_stats(self.policy, [prompt for prompt, _ in groups], rollouts, temperature=temperature)
        sampler = torch.cat([r.sampler_logprob for r in rollouts if r.sampler_logprob is not None])
        is_target = sampler.isfinite()  # tokens of an environment have none
        sums.add(trainer.logprob[is_target], sampler[is_target], trainer.entropy[is_target])


def _num_tok(groups: Sequence[tuple[Prompt, Sequence[Rollout]]]) -> int:
    return sum(len(prompt.token_ids) + sum(len(r.token_ids) for r in rollouts) for prompt, rollouts in groups)
