"""An own objective: a function from log-probabilities to a loss per token, passed to the learner.

python examples/own_objective.py
This one is the sigmoid-gated policy gradient of SAPO (arXiv 2511.20347): soft where others clip.
"""

import torch

from isomorph.engine.config import (
    BatchConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    SamplerConfig,
    Stage,
    TinyModel,
)
from isomorph.engine.model.load import load_policy
from isomorph.engine.rollout.builtin import BuiltinSampler
from isomorph.engine.types import Prompt, Sampling, Scores
from isomorph.engine.update.learner import Learner
from isomorph.engine.update.micro_batches import pack
from isomorph.engine.update.objective import TokenInputs, TokenLoss
from isomorph.engine.update.score import score
from isomorph.kernels.linear_logprob import TokenStats

TAU_UP, TAU_DOWN = 1.0, 1.05  # temperatures of the gate for positive and negative advantages


def sapo(objective: ObjectiveConfig, stats: TokenStats, inputs: TokenInputs) -> TokenLoss:
    """Autograd goes through stats.logprob; the learner multiplies the loss by inputs.weight and sums it."""
    old = stats.logprob.detach() if inputs.old_logprob is None else inputs.old_logprob  # None: the first update
    ratio = (stats.logprob - old).exp()
    tau = torch.where(inputs.advantage > 0, TAU_UP, TAU_DOWN)
    gate = torch.sigmoid(tau * (ratio - 1)) * 4 / tau
    nothing = torch.zeros_like(old, dtype=torch.bool)
    return TokenLoss(loss=-gate * inputs.advantage, is_clipped=nothing, kl=torch.full_like(old, torch.nan))


policy = load_policy(
    ModelConfig(tiny=TinyModel(hidden_size=32, num_layers=2)),
    vocabulary=["gold", "tin"],
    seed=0,
    device=torch.device("cpu"),
)
o = ObjectiveConfig(name="grpo")  # advantages and denominators; two updates a step, so that ratios differ from 1
stage = Stage(name="s", steps=20, objective=o, optim=OptimConfig(lr=3e-3), batch=BatchConfig(num_iterations=2))
sampler, learner = BuiltinSampler(policy, SamplerConfig()), Learner(policy, loss_function=sapo)
sampling = Sampling(temperature=1.0, max_new_tok=4, samples_per_prompt=8, stop_ids=policy.text.stop_ids, seed=0)
learner.enter(stage)
ids = policy.text.encode_prompt("gold")
for step in range(stage.steps):
    prompts = [Prompt(prompt_id=4 * step + i, token_ids=ids, task="t", representation="r", payload=0) for i in range(4)]
    rollouts = sampler.generate(prompts, sampling)
    rewards = [float("gold" in policy.text.decode(r.token_ids.tolist())) for r in rollouts]
    groups = score(prompts, rollouts, Scores(rewards=tuple(rewards)), o)
    updates = pack(groups, micro_batch_tok=2048, prompts_per_update=None, objective=o, device=policy.device)
    loss = learner.update(updates, stage, step).loss
    sampler.publish(step + 1)
    print(f"step {step + 1:2}  reward {sum(rewards) / len(rewards):.3f}  loss {loss:+.4f}")
