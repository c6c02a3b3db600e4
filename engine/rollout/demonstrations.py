"""The sampler of supervised stages (SFT): it returns demonstrations in place of generated responses.

The loop treats a demonstration as any rollout: it is scored, packed and trained on. Its ``sampler_logprob`` is None.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch

from isomorph.engine.config import UserError
from isomorph.engine.model.text import TextCodec
from isomorph.engine.types import Dialogue, OnGroup, OnStep, Prompt, Publication, Rollout, Sampling


class DemonstrationSampler:
    """A ``Sampler`` whose response to a prompt is the text of ``demonstrate(prompt)``.

    ``max_model_len``: limit of prompt and response together, in tokens.
    """

    def __init__(self, text: TextCodec, demonstrate: Callable[[Prompt], str | None], *, max_model_len: int) -> None:
        self.text = text
        self.max_model_len = max_model_len
        self.demonstrate = demonstrate
        self.policy_version = 0

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        on_group: OnGroup | None = None,
        on_step: OnStep | None = None,
        dialogue: Dialogue | None = None,
    ) -> list[Rollout]:
        """One rollout for each prompt, in order. Raises UserError where a demonstration is missing or too long.

        A demonstration has one turn: ``dialogue`` is not asked.
        """
        if sampling.samples_per_prompt != 1:
            raise UserError(
                f"a supervised stage has one demonstration for each prompt: sampling.samples_per_prompt must be 1, "
                f"got {sampling.samples_per_prompt}"
            )
        rollouts = []
        for prompt in prompts:
            rollouts.append(self._rollout(prompt, sampling.max_new_tok))
            if on_step is not None:
                on_step()
        if on_group is not None:
            for index, rollout in enumerate(rollouts):
                on_group(index, [rollout])
        return rollouts

    @contextlib.contextmanager
    def asleep(self) -> Iterator[None]:
        """Context without effect: this sampler holds no memory."""
        yield

    def publish(self, version: int) -> Publication:
        self.policy_version = version
        return Publication(version=version, num_bytes=0, fingerprint="")

    def _rollout(self, prompt: Prompt, max_new_tok: int) -> Rollout:
        response = self.demonstrate(prompt)
        if response is None:
            raise UserError(
                f"prompt {prompt.prompt_id} ({prompt.task}, {prompt.representation}) has no demonstration, which a "
                "supervised stage needs: use a task that provides demonstrations, or an RL objective"
            )
        token_ids = self.text.encode_response(response)
        if len(token_ids) > max_new_tok:
            raise UserError(
                f"the demonstration of prompt {prompt.prompt_id} has {len(token_ids)} tokens: "
                f"sampling.max_new_tok must be at least that, got {max_new_tok}"
            )
        if len(prompt.token_ids) + len(token_ids) > self.max_model_len:
            raise UserError(
                f"prompt {prompt.prompt_id} and its demonstration make {len(prompt.token_ids)} + {len(token_ids)} "
                f"tokens, the model has positions for {self.max_model_len}: leave long prompts out"
            )
        return Rollout(
            prompt_id=prompt.prompt_id,
            sample=0,
            token_ids=torch.tensor(token_ids),
            sampler_logprob=None,
            finish="stop",
            policy_version=self.policy_version,
        )
