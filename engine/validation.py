"""Loss of demonstrations that no stage trains on."""

import dataclasses
from collections.abc import Callable, Sequence

from isomorph.engine.components import Components
from isomorph.engine.model.policy import Policy
from isomorph.engine.model.scoring import trainer_logprob
from isomorph.engine.rollout.demonstrations import DemonstrationSampler
from isomorph.engine.types import Answers, EvaluationRequest, Prompt, Sampling
from isomorph.kernels.packing import assign_groups


def with_validation_loss(components: Components, request: EvaluationRequest, greedy: Answers) -> Answers:
    """``greedy`` with the loss of ``request.validation``. A collective: all ranks must call it."""
    if not request.validation:
        return greedy
    source, most = components.source, request.validation_batch_tok
    found = validation_loss(components.policy, request.validation, source.demonstrate, micro_batch_tok=most)
    return dataclasses.replace(greedy, validation_loss=found)


def validation_loss(
    policy: Policy,
    prompts: Sequence[Prompt],
    demonstrate: Callable[[Prompt], str | None],
    *,
    micro_batch_tok: int,
) -> dict[str, float]:
    """Mean loss of the prompts' demonstrations, by ``Prompt.representation``: nats per token, each token counts once.

    That is the loss of a supervised step on all of them. A collective where the weights are in shards: every rank
    scores all. Raises UserError where a demonstration is missing or longer than the model's positions.
    """
    sampling = Sampling(temperature=1.0, max_new_tok=policy.max_model_len, samples_per_prompt=1, stop_ids=(), seed=0)
    sampler = DemonstrationSampler(policy.text, demonstrate, max_model_len=policy.max_model_len)
    rollouts = sampler.generate(prompts, sampling)
    num_packed = [len(p.token_ids) + len(r.token_ids) - 1 for p, r in zip(prompts, rollouts, strict=True)]
    found: dict[str, list[float]] = {prompt.representation: [] for prompt in prompts}
    for members in assign_groups(num_packed, micro_batch_tok):
        own = [prompts[i] for i in members]
        scored = trainer_logprob(policy, own, [rollouts[i] for i in members], temperature=1.0)
        for prompt, logprob_n in zip(own, scored, strict=True):
            found[prompt.representation] += (-logprob_n).tolist()
    return {representation: sum(losses) / len(losses) for representation, losses in found.items()}
