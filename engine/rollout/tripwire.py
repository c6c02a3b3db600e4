"""The proof that both sides hold the same weights.

After each publish ``check_publication`` compares fingerprints of both sides, and has the trainer score a few tokens
that the sampler drew. Where both sides share storage the fingerprint is of addresses: tensors of one name, shape and
place hold the same bits, and no memory is read. Where they do not it is of every bit. The probe sees what neither can:
a sampler that computes with a copy it made of its weights earlier.
"""

import dataclasses
import math
import time

import torch

from isomorph.engine.drift import DriftSums, check_step, step_drift
from isomorph.engine.model.policy import Policy
from isomorph.engine.model.scoring import trainer_stats
from isomorph.engine.rollout.fingerprint import fingerprint, storage_fingerprint
from isomorph.engine.types import Prompt, Publication, RunFailed, Sampler, Sampling, StepDrift

PROBE_TOK, PROBE_SAMPLES, PROBE_PROMPT_TOK = 8, 2, 64


def check_publication(
    policy: Policy,
    sampler: Sampler,
    publication: Publication,
    probe_prompt: Prompt | None,
    max_mean_drift: float | None,
) -> Publication:
    """Proves that ``sampler`` samples from ``policy`` as it is now, or raises RunFailed.

    Returns the publication with the seconds that the proof took.

    Three things must hold: the sampler's version is the published one; both sides have one fingerprint; and a few
    tokens, drawn by the sampler after the beginning of ``probe_prompt``, get the same log-probabilities from the
    trainer. ``probe_prompt``: None where all that is drawn next will be compared before it is learned from.
    ``max_mean_drift``: as ``check_step`` takes it. A probe has few tokens, of which the tail is judged.
    """
    start = time.perf_counter()
    if sampler.policy_version != publication.version:
        raise RunFailed(f"published version {publication.version}, but the sampler says {sampler.policy_version}")
    if publication.fingerprint:
        is_shared = publication.num_bytes == 0
        own = storage_fingerprint(policy.base()) if is_shared else fingerprint(policy.weights())
        if own != publication.fingerprint:
            raise RunFailed(
                f"after publishing version {publication.version} the sampler's weights have fingerprint "
                f"{publication.fingerprint}, the trainer's {own}: responses would come from stale weights"
            )
    compared = time.perf_counter()
    publication = dataclasses.replace(publication, fingerprint_s=publication.fingerprint_s + compared - start)
    if probe_prompt is None:
        return publication
    drift = probe_drift(policy, sampler, probe_prompt)
    if not math.isfinite(drift.largest):
        raise RunFailed(f"after publishing version {publication.version} a probe's log-probabilities are not finite")
    check_step(drift, policy.dtype, policy.config.num_hidden_layers, max_mean_drift)
    return dataclasses.replace(publication, probe_s=time.perf_counter() - compared)


def probe_drift(policy: Policy, sampler: Sampler, prompt: Prompt) -> StepDrift:
    """Of a few tokens that the sampler draws."""
    num_tok = max(1, min(PROBE_PROMPT_TOK, len(prompt.token_ids) - PROBE_TOK))  # fits wherever the prompt does
    probe = dataclasses.replace(prompt, token_ids=prompt.token_ids[:num_tok])
    sampling = Sampling(
        temperature=1.0,
        max_new_tok=PROBE_TOK,
        samples_per_prompt=PROBE_SAMPLES,
        stop_ids=policy.text.stop_ids,
        seed=0,
    )
    rollouts = sampler.generate([probe], sampling)
    trainer = trainer_stats(policy, [probe], rollouts, temperature=sampling.temperature)
    drawn = torch.cat([r.sampler_logprob for r in rollouts if r.sampler_logprob is not None])
    sums = DriftSums(policy.device)
    sums.add(trainer.logprob, drawn.to(policy.device), trainer.entropy)
    return step_drift([sums.tensors()], 0, 0)
