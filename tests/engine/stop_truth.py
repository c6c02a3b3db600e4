"""Where a response must end by stop strings: a decode of every prefix."""

from collections.abc import Sequence

import torch

from isomorph.engine.model.policy import Policy
from isomorph.engine.model.text import TextCodec
from isomorph.engine.types import Rollout


def first_end(codec: TextCodec, stop: Sequence[str], token_ids: list[int]) -> int | None:
    ends = (end for end in range(1, len(token_ids) + 1) if any(s in codec.decode(token_ids[:end]) for s in stop))
    return next(ends, None)


def check_that_they_end_there(policy: Policy, stop: Sequence[str], free: list[Rollout], ended: list[Rollout]) -> None:
    cut = 0
    for whole, part in zip(free, ended, strict=True):
        end = first_end(policy.text, stop, whole.token_ids.tolist())
        n = len(whole.token_ids) if end is None else end
        assert part.token_ids.tolist() == whole.token_ids[:n].tolist()
        assert part.finish == ("stop" if end is not None else whole.finish)
        assert part.sampler_logprob is not None and whole.sampler_logprob is not None
        torch.testing.assert_close(part.sampler_logprob, whole.sampler_logprob[:n], rtol=1e-5, atol=1e-5)
        cut += n < len(whole.token_ids)
    assert 0 < cut < len(free)
