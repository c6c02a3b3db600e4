"""Checks after a weight sync that the sampler computes with the trainer's present weights.

1. Fingerprints: hashes of all bits on both sides or, if they share storage, of the addresses, which reads no memory.
2. Probe: the sampler generates a few tokens, and the trainer computes their log-probabilities as well. This detects a
   sampler whose tensors are right, but which computes with an older copy of them.
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
    """Raises RunFailed unless ``sampler`` samples from the present weights of ``policy``.

    Three conditions: the sampler's version is the published one; the fingerprints agree; and PROBE_SAMPLES *
    PROBE_TOK tokens, generated after the beginning of ``probe_prompt``, have the same log-probabilities in the trainer,
    within the limits of ``check_step``, which takes ``max_mean_drift``. ``probe_prompt``: None skips the probe, where
    the learner compares all generated tokens before its first optimizer step.

    Returns the publication with ``fingerprint_s`` and ``probe_s`` set, in seconds.
    """
    start = time.perf_counter()
    if sampler.policy_version != publication.version:
        raise RunFailed(f"the published version is {publication.version}, the sampler's {sampler.policy_version}")
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
        raise RunFailed(f"after publishing version {publication.version} the probe's log-probabilities are not finite")
    check_step(drift, policy.dtype, policy.config.num_hidden_layers, max_mean_drift)
    return dataclasses.replace(publication, probe_s=time.perf_counter() - compared)


def probe_drift(policy: Policy, sampler: Sampler, prompt: Prompt) -> StepDrift:
    """Trainer-sampler log-probability mismatch of a few tokens that the sampler generates after ``prompt``."""
    # with the generated tokens no longer than the prompt, so that it fits
    num_tok = max(1, min(PROBE_PROMPT_TOK, len(prompt.token_ids) - PROBE_TOK))
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
    sampler_logprob = torch.cat([r.sampler_logprob for r in rollouts if r.sampler_logprob is not None])
    sums = DriftSums(policy.device)
    sums.add(trainer.logprob, sampler_logprob.to(policy.device), trainer.entropy)
    return step_drift([sums.tensors()], 0, 0)
