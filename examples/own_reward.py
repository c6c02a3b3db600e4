"""Own prompts and an own reward through the engine: no recipe, no command line. python examples/own_reward.py [MODEL]
Without MODEL (a folder or a hub name) a tiny model with random weights is built: it learns to say "gold".
"""

import sys

import torch

from isomorph.engine.config import (
    BatchConfig,
    ModelConfig,
    OptimConfig,
    SamplerConfig,
    SamplingConfig,
    Stage,
    TinyModel,
)
from isomorph.engine.model.load import load_policy
from isomorph.engine.rollout.builtin import BuiltinSampler
from isomorph.engine.types import Prompt, Sampling, Scores
from isomorph.engine.update.learner import Learner
from isomorph.engine.update.micro_batches import pack
from isomorph.engine.update.score import score

QUESTIONS = ["name a metal", "name a river", "name a town", "name a bird"]
WORDS = ["name", "a", "metal", "river", "town", "bird", "gold", "lead", "iron", "tin"]


def reward(question: str, response: str) -> float:
    return 1.0 if "gold" in response.split() else 0.0


tiny = TinyModel(hidden_size=32, num_layers=2)
model = ModelConfig(path=sys.argv[1]) if len(sys.argv) > 1 else ModelConfig(tiny=tiny)
policy = load_policy(model, vocabulary=WORDS, seed=0, device=torch.device("cpu"))
stage = Stage(
    name="gold",
    steps=20,
    optim=OptimConfig(lr=3e-3 if model.tiny else 1e-6, warmup_share=0.1),
    batch=BatchConfig(prompts=len(QUESTIONS)),
    sampling=SamplingConfig(max_new_tok=4, samples_per_prompt=8),
)
sampler, learner = BuiltinSampler(policy, SamplerConfig()), Learner(policy)
sampling = Sampling(temperature=1.0, max_new_tok=4, samples_per_prompt=8, stop_ids=policy.text.stop_ids, seed=0)
learner.enter(stage)
o = stage.objective  # DAPO's, the default
for step in range(stage.steps):
    prompts = [  # the noise of a response is drawn for (seed, prompt_id, sample), so ids must not repeat
        Prompt(prompt_id=step * len(QUESTIONS) + i, token_ids=ids, task="metals", representation="words", payload=q)
        for i, q in enumerate(QUESTIONS)
        for ids in [policy.text.encode_prompt(q)]
    ]
    rollouts = sampler.generate(prompts, sampling)  # 8 for each prompt, in order
    texts = [policy.text.decode(rollout.token_ids.tolist()) for rollout in rollouts]
    rewards = [reward(prompts[i // 8].payload, text) for i, text in enumerate(texts)]
    groups = score(prompts, rollouts, Scores(rewards=tuple(rewards)), o)
    updates = pack(groups, micro_batch_tok=2048, prompts_per_update=None, objective=o, device=policy.device)
    stats = learner.update(updates, stage, step)
    sampler.publish(step + 1)
    print(f"step {step + 1:2}  reward {sum(rewards) / len(rewards):.3f}  entropy {stats.entropy:.2f}")
