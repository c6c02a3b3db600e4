"""An own sampler: whatever gives token ids with their log-probabilities. Here transformers' generate.

python examples/own_sampler.py
"""

import copy
from collections.abc import Sequence

import torch
from transformers import AutoModelForCausalLM

from isomorph.engine.config import ModelConfig, TinyModel
from isomorph.engine.model.load import load_policy
from isomorph.engine.model.policy import Policy
from isomorph.engine.model.scoring import trainer_logprob
from isomorph.engine.types import Prompt, Rollout, Sampling


class GenerateSampler:
    """For ``Components.sampler``, which also takes callbacks and ``asleep``, see ``Sampler`` in engine/types.py."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        config = copy.deepcopy(policy.config)  # from_config writes into it
        self.model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=policy.dtype)
        self.publish(0)

    def publish(self, version: int) -> None:
        self.model.load_state_dict(self.policy.model.state_dict())
        self.policy_version = version

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Rollout]:
        return [rollout for prompt in prompts for rollout in self._group(prompt, sampling)]

    def _group(self, prompt: Prompt, sampling: Sampling) -> list[Rollout]:
        ids = torch.tensor([prompt.token_ids] * sampling.samples_per_prompt)
        options = dict(do_sample=True, temperature=sampling.temperature, top_k=0, top_p=1.0, output_logits=True)
        ends = dict(max_new_tokens=sampling.max_new_tok, eos_token_id=list(sampling.stop_ids), pad_token_id=0)
        options |= dict(attention_mask=torch.ones_like(ids), return_dict_in_generate=True)
        out = self.model.generate(ids, **options, **ends)
        drawn = out.sequences[:, ids.shape[1] :]
        logits = torch.stack(out.logits, 1) / sampling.temperature  # as the trainer's: at the sampling temperature
        logprob = logits.log_softmax(-1).gather(2, drawn[:, :, None])[:, :, 0]
        return [self._rollout(prompt, i, drawn[i], logprob[i], sampling) for i in range(len(drawn))]

    def _rollout(self, prompt: Prompt, i: int, drawn: torch.Tensor, logprob: torch.Tensor, s: Sampling) -> Rollout:
        stops = [n for n, token in enumerate(drawn.tolist()) if token in s.stop_ids]
        n = stops[0] + 1 if stops else len(drawn)  # the stop token belongs to the response, and is trained on
        how = dict(finish="stop" if stops else "length", policy_version=self.policy_version)
        return Rollout(prompt_id=prompt.prompt_id, sample=i, token_ids=drawn[:n], sampler_logprob=logprob[:n], **how)


tiny = ModelConfig(tiny=TinyModel(hidden_size=32, num_layers=2))
policy = load_policy(tiny, vocabulary=["one", "two"], seed=0, device=torch.device("cpu"))
prompt = Prompt(prompt_id=0, token_ids=policy.text.encode_prompt("one two"), task="t", representation="r", payload=None)
sampling = Sampling(temperature=0.8, max_new_tok=6, samples_per_prompt=4, stop_ids=policy.text.stop_ids, seed=0)
rollouts = GenerateSampler(policy).generate([prompt], sampling)
trainer = trainer_logprob(policy, [prompt], rollouts, temperature=0.8)
apart = max(float((a - r.sampler_logprob).abs().max()) for a, r in zip(trainer, rollouts, strict=True))
print(f"{len(rollouts)} responses; the trainer's log-probabilities are at most {apart:.1e} nats from the sampler's")
