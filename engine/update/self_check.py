"""Whether an optimizer step does what the objective says, on a tiny model, before a run trains the real one.

No statistic of a run shows an advantage with the wrong sign, a token compared with its neighbour's target in trainer
and sampler alike, or a denominator that is counted per micro-batch or per rank: the run merely learns nothing. So a
model of 8,000 weights makes one step on two groups of four responses, of which two have reward 1 and two 0:

    aligned     each token's log-probability is that of a plain forward pass over its own sequence, unpacked
    whole       the gradient is the same whether the groups are one micro-batch or several, and over all ranks
    direction   the log-probability of the rewarded responses less that of the others rises (sft: that of all rises)

The direction is exact to first order: the responses of its group are equally long, so that the loss of every objective
is -c times that difference where the ratio is 1, no bound is met, and KL and entropy terms are off; and Adam's first
step moves each weight against the sign of its gradient. TOLERANCE is far above the rounding of float32 sums over some
hundred terms (1e-6) and far below a factor of two. It takes a fraction of a second on the CPU and draws no random
number.
"""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from isomorph.engine.config import BatchConfig, ObjectiveConfig, OptimConfig, SamplingConfig, Stage, TinyModel
from isomorph.engine.distributed.ranks import ALONE, Ranks
from isomorph.engine.model.load import build_tiny
from isomorph.engine.model.policy import Policy
from isomorph.engine.model.scoring import trainer_stats
from isomorph.engine.types import Group, Prompt, Rollout, RunFailed, Scores
from isomorph.engine.update.learner import Learner
from isomorph.engine.update.micro_batches import pack
from isomorph.engine.update.objective import LossFunction, loss_of_tokens
from isomorph.engine.update.score import score

TOLERANCE = 1e-3  # of log-probabilities, nats; of gradients, relative to their norm
TINY = TinyModel(hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, intermediate_size=48, max_model_len=32)
WORDS = [f"w{chr(97 + i)}" for i in range(20)]
LENGTHS = ((5, 5, 5, 5), (2, 7, 4, 6))  # of the responses of each group: equal ones for the direction
REWARDS = (1.0, 0.0, 1.0, 0.0)
WHOLE, SPLIT = 1000, 14  # tokens of a micro-batch
ADVICE = "this is a defect of this version or of your own loss, not of the recipe: train nothing with it, and report it"

_passed: set[tuple[str, float, int]] = set()  # in this process


def check_stages(stages: Sequence[Stage], ranks: Ranks = ALONE) -> None:
    """``check_learning`` of each stage's objective, once in a process for each."""
    for stage in stages:
        key = stage.objective.model_dump_json(), stage.sampling.temperature, ranks.size
        if key not in _passed:
            check_learning(stage.objective, stage.sampling.temperature, ranks)
            _passed.add(key)


def check_learning(
    objective: ObjectiveConfig,
    temperature: float = 1.0,
    ranks: Ranks = ALONE,
    loss_function: LossFunction = loss_of_tokens,
) -> None:
    """Raises RunFailed unless a step with ``objective`` moves a tiny policy as it should.

    ``temperature``: of sampling. ``ranks``: a collective; their process group must sum tensors of the CPU.
    """
    plain = _without_further_terms(objective)
    temperature = min(max(temperature, 0.1), 10.0)  # beyond it rounding grows, and the direction says no more
    is_supervised = objective.is_supervised
    stage = Stage(
        name="self-check",
        steps=1,
        objective=plain,
        optim=OptimConfig(lr=1e-3, clip_norm=None),
        batch=BatchConfig(prompts=len(LENGTHS), micro_batch_tok=WHOLE),
        sampling=SamplingConfig(
            temperature=temperature, max_new_tok=8, samples_per_prompt=1 if is_supervised else len(REWARDS)
        ),
    )
    policy = build_tiny(TINY, WORDS, seed=0, dtype=torch.float32, device=torch.device("cpu"))
    groups = _groups(policy, stage)
    _check_alignment(policy, groups, stage.loss_temperature)
    _check_gradient(policy, groups, stage, ranks, loss_function)
    _check_direction(policy, groups[:1], stage, loss_function)


def _without_further_terms(objective: ObjectiveConfig) -> ObjectiveConfig:
    """Without KL and entropy; with bounds so wide that rounding of ratios and weights, which are 1, meets none."""
    off = {"kl_coef": 0.0, "reward_kl_coef": 0.0, "entropy_coef": 0.0, "importance_sampling_floor": 0.0}
    wide = {"clip_low": 0.1, "clip_high": 0.1, "importance_sampling_cap": 2.0}
    bounds = {name: getattr(objective, name) for name in wide}
    widened = {name: max(least, bounds[name]) for name, least in wide.items() if bounds[name] is not None}
    return objective.model_copy(update={**off, **widened})


def _groups(policy: Policy, stage: Stage) -> list[Group]:
    """Two groups of fixed responses, with advantages and the log-probabilities that a sampler would report."""
    prompts, rollouts = [], []
    for i, lengths in enumerate(LENGTHS):
        prompts.append(Prompt(prompt_id=i, token_ids=(2, 5 + i, 9), task="", representation="", payload=None))
        rollouts += [
            Rollout(
                prompt_id=i,
                sample=sample,
                token_ids=(torch.arange(length) * (2 + sample) + 3 * sample + i) % len(WORDS) + 4,
                sampler_logprob=None,
                finish="length",
                policy_version=0,
            )
            for sample, length in enumerate(lengths)
        ]
    if not stage.objective.is_supervised:
        stats = trainer_stats(policy, prompts, rollouts, temperature=stage.sampling.temperature)
        told = stats.logprob.split([len(r.token_ids) for r in rollouts])
        rollouts = [dataclasses.replace(r, sampler_logprob=q) for r, q in zip(rollouts, told, strict=True)]
    return score(prompts, rollouts, Scores(rewards=REWARDS * len(LENGTHS)), stage.objective)


def _check_alignment(policy: Policy, groups: Sequence[Group], temperature: float) -> None:
    rollouts = [r for group in groups for r in group.rollouts]
    found = trainer_stats(policy, [group.prompt for group in groups], rollouts, temperature=temperature).logprob
    plain = torch.cat([_plain_logprob(policy, g.prompt, r, temperature) for g in groups for r in g.rollouts])
    worst = (found - plain).abs().max().item()
    if not worst <= TOLERANCE:
        raise RunFailed(
            f"self-check: log-probabilities of packed responses differ by {worst:.2g} nats from those of a plain "
            f"forward pass, at most {TOLERANCE:g} is rounding: tokens and targets, positions or the attention mask are "
            f"shifted (engine/packed_batch.py, kernels/packed_attention.py); {ADVICE}"
        )


@torch.no_grad()
def _plain_logprob(policy: Policy, prompt: Prompt, rollout: Rollout, temperature: float) -> Tensor:
    """[n]: of one response after its prompt, unpacked, by PyTorch's attention and softmax."""

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True).transpose(1, 2)

    token_ids = torch.tensor([*prompt.token_ids, *rollout.token_ids.tolist()])
    hidden_TD = policy.backbone(token_ids[None], torch.arange(len(token_ids))[None], attend)[0]
    all_TV = torch.log_softmax(hidden_TD @ policy.unembedding.T / temperature, -1)
    return all_TV[len(prompt.token_ids) - 1 : -1].gather(1, rollout.token_ids[:, None])[:, 0]


def _check_gradient(
    policy: Policy, groups: Sequence[Group], stage: Stage, ranks: Ranks, loss_function: LossFunction
) -> None:
    whole = _stepped(policy, groups, stage, WHOLE, ALONE, loss_function)[0]
    for micro_batch_tok, members in ((SPLIT, ALONE), (WHOLE, ranks)):
        part = _stepped(policy, groups, stage, micro_batch_tok, members, loss_function)[0]
        error = ((part - whole).norm() / whole.norm()).item()
        if not error <= TOLERANCE:
            how = f"over {members.size} ranks" if members.size > 1 else f"in micro-batches of {micro_batch_tok} tokens"
            raise RunFailed(
                f"self-check: the gradient of objective {stage.objective.name!r} {how} differs by {error:.1%} of its "
                "norm from that of one micro-batch on one rank: a denominator is not that of the whole optimizer step "
                f"(engine/update/micro_batches.py, token_weight in engine/update/objective.py); {ADVICE}"
            )


def _check_direction(policy: Policy, groups: Sequence[Group], stage: Stage, loss_function: LossFunction) -> None:
    before, after = _stepped(policy, groups, stage, WHOLE, ALONE, loss_function)[1:]
    rises = after - before  # [responses]
    is_supervised = stage.objective.is_supervised
    wanted_S = torch.ones(len(REWARDS)) if is_supervised else 2 * torch.tensor(REWARDS) - 1
    rise = (wanted_S * rises).sum().item()
    if not rise > 0:
        what = "the demonstrations" if is_supervised else "the rewarded responses, less that of the others,"
        raise RunFailed(
            f"self-check: a step with objective {stage.objective.name!r} must raise the log-probability of {what} and "
            f"changed it by {rise:+.2g} nats: a sign is wrong (kernels/advantage.py, engine/update/objective.py, "
            f"engine/update/optimizer.py); {ADVICE}"
        )


def _stepped(
    policy: Policy,
    groups: Sequence[Group],
    stage: Stage,
    micro_batch_tok: int,
    ranks: Ranks,
    loss_function: LossFunction,
) -> tuple[Tensor, Tensor, Tensor]:
    """One optimizer step; returns its gradient as one vector, and each response's log-probability before and after.

    The policy's weights are as before when it returns.
    """
    weights, learner = policy.snapshot(), Learner(policy, ranks, loss_function=loss_function)
    learner.enter(stage)
    updates = pack(
        groups,
        micro_batch_tok=micro_batch_tok,
        prompts_per_update=None,
        objective=stage.objective,
        device=policy.device,
        ranks=ranks,
    )
    before = _logprob_of_each(policy, groups)
    learner.update(updates, stage, 0)
    moments = {k: t for k, t in learner.state_tensors().items() if k.startswith("exp_avg/")}  # (1 - beta_1) gradient
    after = _logprob_of_each(policy, groups)
    learner.close()
    policy.overwrite(weights)
    return torch.cat([t.flatten() for t in moments.values()]), before, after


def _logprob_of_each(policy: Policy, groups: Sequence[Group]) -> Tensor:
    """[responses]: by plain forward passes, so that it does not rest on what is checked."""
    sums = [_plain_logprob(policy, g.prompt, r, 1.0).sum() for g in groups for r in g.rollouts]
    return torch.stack(sums)
