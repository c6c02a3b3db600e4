"""sample_token, every implementation: the argmax, frequencies of tokens, batch invariance, strides."""

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from isomorph.kernels import backend
from isomorph.kernels.sample_token import gumbel_noise, sample_token, sample_token_ref
from isomorph.kernels.token_logprob import token_logprob_ref

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HAS_NATIVE = backend.native_available() and DEVICE == "cpu"
ISAS = [f"native-{isa}" for isa in backend.native().isas()] if HAS_NATIVE else []
TRITON = [] if backend.triton_reason() else ["triton"]
EDGES = [1, 2, 15, 17, 255, 256, 257, 1023, 1024, 1025, 1300, 4095, 4097]


@pytest.fixture(params=[*ISAS, *TRITON, "reference"], autouse=True)
def body(request: pytest.FixtureRequest) -> Iterator[str]:
    name, _, isa = request.param.partition("-")
    if isa:
        backend.native().use_isa(isa)
    with backend.using(f"sample_token={name}"):
        yield name
    if isa:
        backend.native().use_isa("")


def make_rows(
    num: int, vocab: int, dtype: torch.dtype = torch.float32, std: float = 3.0
) -> tuple[Tensor, Tensor, Tensor]:
    gen = torch.Generator().manual_seed(num * 7919 + vocab)
    logits = (std * torch.randn(num, vocab, generator=gen)).to(dtype)
    key = torch.randint(-(2**62), 2**62, (num,), generator=gen)
    return logits.to(DEVICE), key.to(DEVICE), torch.arange(num, device=DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("vocab", EDGES)
def test_the_winner_has_the_largest_score_and_its_logprob_is_the_softmaxs(vocab: int, dtype: torch.dtype) -> None:
    """A winner may differ from float64's where their scores tie to rounding."""
    logits, key, position = make_rows(5, vocab, dtype)
    token, logprob = sample_token(logits, key, position, temperature=0.7)
    assert token.dtype == torch.int64 and logprob.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    score = logits.double() / 0.7 + gumbel_noise(key, position, vocab)
    gap = score.amax(1) - score.gather(1, token[:, None])[:, 0]
    assert gap.max() <= (1e-12 if dtype == torch.float64 else 2e-5)
    truth = token_logprob_ref(logits.double(), token, temperature=0.7).logprob
    assert (logprob - truth).abs().max() <= (
        1e-12 if dtype == torch.float64 else 5e-6 * float(logits.abs().max()) + 1e-6
    )


def test_the_noise_is_philox() -> None:
    """The known answer of Random123 for Philox4x32-10 with counter and key 0."""
    noise = gumbel_noise(torch.tensor([0]), torch.tensor([0]), 1024)
    for column, word in ((0, 0x6627E8D5), (256, 0xE169C58D), (512, 0xBC57AC4C), (768, 0x9B00DBD8)):
        assert noise[0, column].item() == pytest.approx(-math.log(-math.log1p(-(word + 0.5) / 2**32)), rel=1e-12)


def test_tokens_come_as_often_as_the_softmax_says(body: str) -> None:
    num = {"triton": 200, "reference": 2000}.get(body, 20_000)
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, -math.inf, 0.5, -3.0, 1.5], device=DEVICE)
    key = torch.arange(num, device=DEVICE) * 0x9E3779B97F4A7C15 % 2**63
    token, _ = sample_token(logits.expand(num, 8).contiguous(), key, torch.zeros_like(key), temperature=1.3)
    expected = (logits.double() / 1.3).softmax(0) * num
    count = torch.bincount(token, minlength=8)
    assert count[4] == 0
    chi2 = ((count - expected).square() / expected.clamp(min=1e-9))[expected > 0].sum()
    assert chi2 < 24.3  # 6 degrees of freedom; passed by chance once in 2,000 seeds, and the seed is fixed


def test_flat_large_vocabularies_are_drawn_evenly(body: str) -> None:
    num, vocab = (8, 40_000) if body in ("triton", "reference") else (200, 150_000)
    _, key, position = make_rows(num, 1)
    token, logprob = sample_token(torch.zeros(num, vocab, device=DEVICE), key, position)
    assert len(token.unique()) > 0.95 * num
    assert abs(token.double().mean().item() / vocab - 0.5) < 4 * (1 / 12) ** 0.5 / num**0.5
    torch.testing.assert_close(logprob, torch.full_like(logprob, -math.log(vocab)), rtol=1e-6, atol=0)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(st.integers(1, 2100), st.integers(1, 6))
def test_a_rows_bits_do_not_depend_on_the_other_rows(vocab: int, num: int) -> None:
    logits, key, position = make_rows(num, vocab)
    token, logprob = sample_token(logits, key, position)
    for i in range(num):
        alone = sample_token(logits[i : i + 1], key[i : i + 1], position[i : i + 1])
        assert torch.equal(alone[0], token[i : i + 1])
        assert torch.equal(alone[1], logprob[i : i + 1]) or backend.choose("sample_token", DEVICE) == "reference"


def test_key_and_position_decide_and_nothing_else_does() -> None:
    logits, key, position = make_rows(1, 3000, std=0.1)
    rows = logits.expand(6, -1).contiguous()
    keys = torch.stack([key[0], key[0], key[0] + 1, key[0] + 2**40, key[0], key[0]])
    positions = torch.tensor([7, 7, 7, 7, 8, 7 + 2**33], device=DEVICE)
    token, _ = sample_token(rows, keys, positions)
    assert token[0] == token[1]
    assert len(set(token.tolist())) == 5


def test_extreme_rows() -> None:
    vocab = 1500
    rows = torch.full((5, vocab), -math.inf, device=DEVICE)
    rows[0, 1234] = 3.0  # the only possible token
    rows[1] = -1e30
    rows[2, 1:3] = torch.tensor([1e4, 1e4 - 200], device=DEVICE)  # certain to rounding
    rows[3] = torch.linspace(-50, 50, vocab, device=DEVICE)
    rows[3, 9] = math.nan
    rows[4] = 5.0
    token, logprob = sample_token(rows, *make_rows(5, vocab)[1:])
    assert token[0] == 1234 and logprob[0] == 0
    assert token[2] == 1 and logprob[2] == 0
    assert logprob[1].item() == pytest.approx(-math.log(vocab), rel=1e-5)
    assert logprob[3].isnan() and 0 <= token[3] < vocab
    assert logprob[[0, 1, 2, 4]].isfinite().all()


def test_rows_may_be_strided_and_none_at_all() -> None:
    logits, key, position = make_rows(4, 300)
    wide = torch.zeros(4, 2, 300, device=DEVICE)
    wide[:, 0] = logits
    for view in (wide[:, 0], logits.T.contiguous().T):
        assert torch.equal(sample_token(view, key, position)[0], sample_token(logits, key, position)[0])
    token, logprob = sample_token(logits[:0], key[:0], position[:0])
    assert token.shape == logprob.shape == (0,)


def test_bodies_draw_the_same_tokens() -> None:
    logits, key, position = make_rows(40, 1300)
    assert torch.equal(sample_token(logits, key, position)[0], sample_token_ref(logits, key, position)[0])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": torch.zeros(4)}, TypeError, r"logits must be floating point \[B, V\]"),
        ({"logits": torch.zeros(4, 0)}, TypeError, "V > 0"),
        ({"logits": torch.zeros(4, 3, dtype=torch.int64)}, TypeError, "floating point"),
        ({"key": torch.zeros(3, dtype=torch.int64)}, TypeError, r"rng_key must be int64 \[4\]"),
        ({"position": torch.zeros(4)}, TypeError, r"position must be int64 \[4\]"),
        ({"temperature": 0.0}, ValueError, "temperature must be > 0"),
    ],
)
def test_bad_arguments_are_refused(change: dict, error: type[Exception], message: str) -> None:
    given = {"logits": torch.zeros(4, 3), "key": torch.zeros(4, dtype=torch.int64), "temperature": 1.0}
    given = {"position": given["key"], **given, **change}
    with pytest.raises(error, match=message):
        sample_token(given["logits"], given["key"], given["position"], temperature=given["temperature"])
