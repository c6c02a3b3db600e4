"""The statistics against their definitions, and each fault that they are for, planted in a sampler that draws."""

import dataclasses
import math
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from small_world import CPU, one_thread  # noqa: F401
from torch import Tensor

from isomorph.engine import drift
from isomorph.engine.config import ModelConfig, RunConfig, SamplerConfig, TinyModel
from isomorph.engine.drift import DriftSums, Surprise, check_ends, check_step, mean_limit, step_drift, tail_count
from isomorph.engine.model.load import build_tiny, load_policy
from isomorph.engine.model.policy import Policy
from isomorph.engine.model.scoring import trainer_logprob, trainer_stats
from isomorph.engine.rollout import decoder
from isomorph.engine.rollout.builtin import BuiltinSampler
from isomorph.engine.types import Prompt, Rollout, RunFailed, Sampling, StepDrift
from isomorph.kernels.linear import onednn_has_bfloat16
from isomorph.kernels.linear_logprob import TokenStats

WORDS = [f"w{chr(97 + i // 10)}{chr(97 + i % 10)}" for i in range(60)]
STEP_TOK = 2_000
DTYPES = [torch.float32, torch.bfloat16]


# -- a small world
def make_policy(dtype: torch.dtype = torch.float32) -> Policy:
    """Logits as wide as a language model's: entropy 3.1 nats, varentropy 1.8; half of the responses stop."""
    tiny = TinyModel(hidden_size=64, num_layers=4, num_heads=4, num_kv_heads=2, intermediate_size=96, max_model_len=128)
    policy = build_tiny(tiny, WORDS, seed=0, dtype=dtype, device=CPU)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in policy.named_parameters().items():
            if "norm" not in name:
                weight.copy_((0.2 if "embed" in name else 0.25) * torch.randn(weight.shape, generator=generator))
    return policy


def make_prompts(policy: Policy, step: int) -> list[Prompt]:
    texts = [" ".join(WORDS[(7 * step + 3 * i + j) % len(WORDS)] for j in range(4)) for i in range(8)]
    return [
        Prompt(prompt_id=i, token_ids=policy.text.encode_prompt(t), task="t", representation="r", payload=None)
        for i, t in enumerate(texts)
    ]


def make_sampling(policy: Policy, step: int, temperature: float = 1.0, max_new_tok: int = 40) -> Sampling:
    return Sampling(
        temperature=temperature,
        max_new_tok=max_new_tok,
        samples_per_prompt=10,
        stop_ids=policy.text.stop_ids,
        seed=step,
    )


Draw = Callable[[list[Prompt], Sampling], list[Rollout]]


def compared(policy: Policy, prompts: list[Prompt], rollouts: list[Rollout]) -> StepDrift:
    return of_one_step(trainer_stats(policy, prompts, rollouts, temperature=1.0), reported(rollouts))


def reported(rollouts: list[Rollout]) -> Tensor:
    """[N] log-probabilities of the sampler."""
    return torch.cat([r.sampler_logprob for r in rollouts if r.sampler_logprob is not None])


def of_one_step(stats: TokenStats, q: Tensor) -> StepDrift:
    assert len(q) >= STEP_TOK, len(q)
    sums = DriftSums(CPU)
    sums.add(stats.logprob[:STEP_TOK], q[:STEP_TOK], stats.entropy[:STEP_TOK])
    return step_drift([sums.tensors()], 0, 0)


def one_step(policy: Policy, draw: Draw, step: int = 0) -> StepDrift:
    prompts = make_prompts(policy, step)
    return compared(policy, prompts, draw(prompts, make_sampling(policy, step)))


def judge(policy: Policy, found: StepDrift) -> None:
    check_step(found, policy.dtype, policy.config.num_hidden_layers, None)


def honest(policy: Policy) -> Draw:
    return BuiltinSampler(policy, SamplerConfig()).generate


def reporting(policy: Policy, draw: Draw, temperature: float) -> Draw:
    """What ``draw`` draws, with the log-probabilities of ``temperature``."""

    def generate(prompts: list[Prompt], sampling: Sampling) -> list[Rollout]:
        rollouts = draw(prompts, sampling)
        told = trainer_logprob(policy, prompts, rollouts, temperature=temperature)
        return [dataclasses.replace(r, sampler_logprob=q) for r, q in zip(rollouts, told, strict=True)]

    return generate


def drawing(policy: Policy, temperature: float) -> Draw:
    inner = honest(policy)
    return lambda prompts, sampling: inner(prompts, dataclasses.replace(sampling, temperature=temperature))


def without(mask: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """The sampler's logits [B, V] are -1e30 where ``mask`` is true."""
    make_logits = decoder.make_logits

    def masked(*given: Tensor) -> Tensor:
        logits = make_logits(*given)
        return logits.masked_fill(mask(logits), -1e30)

    monkeypatch.setattr(decoder, "make_logits", masked)


# -- clean
@pytest.mark.parametrize("dtype", DTYPES)
def test_clean_steps_pass(dtype: torch.dtype) -> None:
    policy, run = make_policy(dtype), Surprise()
    for step in range(5):
        found = one_step(policy, honest(policy), step)
        judge(policy, found)
        run = run.plus(found)
        run.check()
        assert 0 < found.mean < mean_limit(dtype, 4) / 1.5
    assert run.num_tok == 5 * STEP_TOK and abs(run.z) < 5


@pytest.mark.parametrize("p, entropy", [(math.nan, 1.0), (-math.inf, 1.0), (-1.0, math.nan)])
def test_statistics_of_a_trainer_that_is_not_finite_pass_no_limit(p: float, entropy: float) -> None:
    sums, given = DriftSums(CPU), [torch.full((1000,), value) for value in (-1.0, -1.0, 1.0)]
    given[0][3], given[2][3] = p, entropy
    sums.add(*given)
    with pytest.raises(RunFailed, match="not finite"):
        check_step(step_drift([sums.tensors()], 0, 0), torch.float32, 2, None)


def test_a_step_without_sampled_tokens_passes() -> None:
    nothing = step_drift([DriftSums(CPU).tensors()], 3, 0)
    check_step(nothing, torch.float32, 2, None)
    assert math.isnan(nothing.mean) and math.isnan(nothing.p999) and math.isnan(nothing.largest)
    assert Surprise().plus(nothing) == Surprise() and math.isnan(Surprise().z)


# -- faults that one step of 2,000 tokens shows
@pytest.mark.parametrize(("dtype", "change"), [(torch.float32, 1e-3), (torch.bfloat16, 0.02)])
def test_one_stale_layer_is_caught(dtype: torch.dtype, change: float) -> None:
    """``change`` of every weight is what Adam's first step at that learning rate makes."""
    policy, twin = make_policy(dtype), make_policy(dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in policy.named_parameters().items():
            if not name.startswith("model.layers.2."):
                continue
            weight.add_(change * torch.randn(weight.shape, generator=generator).sign().to(dtype))
    judge(policy, one_step(policy, honest(policy)))
    with pytest.raises(RunFailed, match=r"of 2000 sampled tokens .* nats .*a layer is stale"):
        judge(policy, one_step(policy, honest(twin)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("error", [0.02, -0.02])
@pytest.mark.parametrize("draws", [True, False])
def test_a_reported_temperature_that_is_2_percent_off_is_caught(dtype: torch.dtype, error: float, draws: bool) -> None:
    policy = make_policy(dtype)
    draw = drawing(policy, 1 + error) if draws else reporting(policy, honest(policy), 1 + error)
    found = one_step(policy, draw)
    assert found.slope == pytest.approx(error, rel=0.25)
    with pytest.raises(RunFailed, match="sampling.temperature|generation config"):
        judge(policy, found)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_stop_token_that_is_never_drawn_is_caught(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = make_policy(dtype)
    without(stop_tokens(policy), monkeypatch)
    with pytest.raises(RunFailed, match="generation config|leaves tokens out"):
        judge(policy, one_step(policy, honest(policy)))


def stop_tokens(policy: Policy) -> Callable[[Tensor], Tensor]:
    stop = torch.tensor(policy.text.stop_ids)
    return lambda logits: torch.zeros_like(logits).index_fill(1, stop, 1).bool()


def below_top(share: float) -> Callable[[Tensor], Tensor]:
    def mask(logits: Tensor) -> Tensor:
        prob, at = logits.float().softmax(-1).sort(-1, descending=True)
        return (prob.cumsum(-1) - prob > share).gather(1, at.argsort(1))

    return mask


def test_leaving_out_a_percent_of_the_probability_is_caught_below_the_size_of_rounding(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    policy = make_policy(torch.bfloat16)
    without(below_top(0.985), monkeypatch)
    found = one_step(policy, honest(policy))
    assert found.mean < mean_limit(torch.bfloat16, 4)
    assert -0.015 < found.mass < -0.002
    with pytest.raises(RunFailed, match="leaves tokens out"):
        judge(policy, found)


def test_a_stop_token_that_is_drawn_and_dropped_is_caught() -> None:
    policy = make_policy()
    prompts, sampling = make_prompts(policy, 0), make_sampling(policy, 0)
    rollouts = honest(policy)(prompts, sampling)
    check_ends(rollouts, sampling)
    stopped = next(r for r in rollouts if r.finish == "stop" and len(r.token_ids) > 1)
    dropped = dataclasses.replace(stopped, token_ids=stopped.token_ids[:-1])
    full = next(r for r in rollouts if r.finish == "length")
    passed_over = dataclasses.replace(
        full, token_ids=full.token_ids.clone().index_fill(0, torch.tensor(3), policy.text.stop_ids[0])
    )
    for wrong in (dropped, dataclasses.replace(dropped, finish="length"), passed_over):
        with pytest.raises(RunFailed, match="drops stop tokens, or ignores them"):
            check_ends([full, wrong], sampling)


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.skipif(not onednn_has_bfloat16(), reason="takes 8 minutes where bfloat16 is multiplied without AVX-512")
def test_faults_of_a_real_model_in_bfloat16_are_caught(smollm2_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ModelConfig(path=str(smollm2_folder), dtype="bfloat16")
    policy = load_policy(config, vocabulary=[], seed=0, device=CPU)
    texts = [f"Write a few lines on the number {i}." for i in range(8)]
    prompts = [
        Prompt(prompt_id=i, token_ids=policy.text.encode_prompt(t), task="t", representation="r", payload=None)
        for i, t in enumerate(texts)
    ]
    sampling = dataclasses.replace(make_sampling(policy, 0), samples_per_prompt=9)  # 2,000 tokens, hardly more
    rollouts = honest(policy)(prompts, sampling)
    own, q = trainer_stats(policy, prompts, rollouts, temperature=1.0), reported(rollouts)
    judge(policy, of_one_step(own, q))
    hotter = torch.cat(trainer_logprob(policy, prompts, rollouts, temperature=1.02))
    with pytest.raises(RunFailed, match="at another temperature"):
        judge(policy, of_one_step(own, q + hotter - own.logprob))
    without(stop_tokens(policy), monkeypatch)
    endless = honest(policy)(prompts, sampling)
    assert all(r.finish == "length" for r in endless)
    with pytest.raises(RunFailed, match="generation config|leaves tokens out"):
        judge(policy, compared(policy, prompts, endless))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in policy.named_parameters().items():
            if name.startswith("model.layers.15."):
                noise = torch.randn(weight.shape, generator=generator).to(weight.dtype)
                weight.add_(0.1 * weight.float().std() * noise)
    with pytest.raises(RunFailed, match="a layer is stale"):
        judge(policy, compared(policy, prompts, rollouts))


# -- faults that only a run shows
def tokens_until_caught(policy: Policy, draw: Draw, most: int = 40) -> tuple[Surprise, str]:
    run = Surprise()
    for step in range(most):
        found = one_step(policy, draw, step)
        judge(policy, found)  # one step's statistics are blind to it
        run = run.plus(found)
        try:
            run.check()
        except RunFailed as failure:
            return run, str(failure)
    raise AssertionError(f"not caught in {run}")


@pytest.mark.parametrize("temperature", [1.05, 0.95])
def test_drawing_at_a_temperature_5_percent_off_is_caught_within_the_tokens_that_are_stated(temperature: float) -> None:
    policy = make_policy()
    stated = Surprise().plus(one_step(policy, honest(policy))).tokens_needed(0.05)
    run, told = tokens_until_caught(policy, reporting(policy, drawing(policy, temperature), 1.0))
    assert run.num_tok <= 1.15 * stated + STEP_TOK  # the first order of the fault, and a step's end
    assert ("rarer" if temperature > 1 else "more probable") in told and "another distribution than it reports" in told


def test_drawing_from_the_top_95_percent_is_caught_in_a_few_thousand_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = make_policy()
    without(below_top(0.95), monkeypatch)
    run, told = tokens_until_caught(policy, reporting(policy, honest(policy), 1.0))
    assert run.num_tok <= 10_000 and "more probable" in told


# -- the statistics
def test_sums_over_micro_batches_and_ranks_are_the_statistics_of_all_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    q = -torch.rand(5_000, generator=generator, dtype=torch.float64) * 6
    entropy = torch.rand(5_000, generator=generator, dtype=torch.float64) * 3
    d = 0.05 * torch.randn(5_000, generator=generator, dtype=torch.float64) + 0.01 * q
    parts = [DriftSums(CPU), DriftSums(CPU)]
    for i, at in enumerate(torch.arange(5_000).split(700)):
        parts[i % 2].add((q + d)[at], q[at], entropy[at])
    found = step_drift([part.tensors() for part in parts], 2, 3)
    x, s = q + d / 2 + entropy, -q - entropy
    slope = torch.linalg.lstsq(x[:, None], d[:, None]).solution.item()
    assert found.num_tok == 5_000
    assert found.mean == pytest.approx(d.abs().mean().item())
    assert found.largest == pytest.approx(d.abs().max().item())
    assert found.mass == pytest.approx((d.exp() - 1).mean().item())
    assert found.mass_error == pytest.approx((d.exp() - 1).square().sum().sqrt().item() / 5_000)
    assert found.slope == pytest.approx(slope)
    assert found.slope_error == pytest.approx(((x * (d - slope * x)).square().sum().sqrt() / x.square().sum()).item())
    assert 1 <= found.p999 / d.abs().quantile(0.999, interpolation="lower").item() < 1.0595  # 40 bins a decade
    assert found.surprise == pytest.approx(s.sum().item())
    assert found.variance == pytest.approx(s.square().sum().item())
    kept = d.square().sum().item() + s.square().sum().sqrt().item() * (math.sqrt(2) + math.sqrt(3))
    assert found.slack == pytest.approx(kept)


@pytest.mark.parametrize("num_tok", [1, 3, 16, 2_000])
def test_the_tail_is_counted_against_the_binomial_distribution(num_tok: int) -> None:
    def exceeded(count: int) -> float:
        share = Fraction(1, 1000)
        terms = (math.comb(num_tok, k) * share**k * (1 - share) ** (num_tok - k) for k in range(count + 1))
        return float(1 - sum(terms))

    most = tail_count(num_tok)
    assert exceeded(most) <= 1e-9
    assert most <= 1 or exceeded(most - 2) > 1e-9  # Chernoff's bound costs two tokens at most


def test_the_limit_of_the_mean_is_the_recipes_where_it_has_one() -> None:
    p = torch.full((STEP_TOK,), -1.0)
    sums = DriftSums(CPU)
    sums.add(p, p + 0.01 * torch.tensor([1.0, -1.0]).repeat(STEP_TOK // 2), torch.ones(STEP_TOK))
    found = step_drift([sums.tensors()], 0, 0)
    check_step(found, torch.bfloat16, 30, None)
    check_step(found, torch.float32, 30, 0.02)
    with pytest.raises(RunFailed, match=r"differ by 1.00e-02 nats in the mean, more than 0.005 \(run.max_mean_drift"):
        check_step(found, torch.bfloat16, 30, 0.005)
    with pytest.raises(RunFailed, match=r"more than 9.8e-05 \(.* rounding in float32"):
        check_step(found, torch.float32, 30, None)
    with pytest.raises(ValueError, match="max_drift is no longer supported"):
        RunConfig.model_validate({"max_drift": 2.0})


# -- chance
def make_surprises(shape: tuple[int, ...], width: float, seed: int = 0) -> Tensor:
    """s of tokens that are drawn from what is reported, in contexts with 50 logits that are ``width`` wide."""
    generator = torch.Generator().manual_seed(seed)
    logprob = (width * torch.randn(200, 50, generator=generator, dtype=torch.float64)).log_softmax(-1)
    excess = -logprob + (logprob.exp() * logprob).sum(-1, keepdim=True)
    context = torch.randint(200, (math.prod(shape),), generator=generator)
    drawn = torch.rand(math.prod(shape), 1, generator=generator, dtype=torch.float64)
    token = torch.searchsorted(logprob.exp().cumsum(-1)[context], drawn).clamp(max=49)
    return excess[context].gather(1, token).view(shape)


def run_of(s: Tensor, slack: float = 0.0) -> StepDrift:
    return StepDrift(num_tok=s.numel(), surprise=s.sum().item(), variance=s.square().sum().item(), slack=slack)


@pytest.mark.parametrize("width", [0.5, 2.0, 6.0])  # entropies of 3.8, 2.4 and 0.7 nats
def test_the_boundary_is_crossed_at_any_time_by_fewer_runs_than_it_says(
    width: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drift, "FALSE_ALARM", 0.1)
    monkeypatch.setattr(drift, "MIXTURE", 20.0)  # where the boundary is tightest within these runs
    crossed = 0
    for steps in make_surprises((200, 100, 20), width):
        run = Surprise()
        for s in steps:
            run = run.plus(run_of(s))
            if abs(run.z) > run.limit:
                crossed += 1
                break
    assert crossed / 200 <= 0.1 + 3 * math.sqrt(0.1 * 0.9 / 200)  # of 200 runs


def test_selection_by_reward_does_not_trip_with_its_allowance_and_does_without() -> None:
    """A response is right where its surprise is low, the worst case; groups of 8 without variance are dropped."""
    allowed, naive = Surprise(), Surprise()
    for step in range(60):
        s = make_surprises((32, 8, 25), 2.0, seed=step)
        right = s.sum(-1) < 6
        kept = s[~(right.all(-1) | (~right).all(-1))]
        num_dropped = 32 - len(kept)
        assert 0 < num_dropped < 28
        sums = DriftSums(CPU)
        sums.add(-kept.flatten(), -kept.flatten(), torch.zeros(kept.numel()))
        allowed = allowed.plus(step_drift([sums.tensors()], num_dropped, 0))
        naive = naive.plus(step_drift([sums.tensors()], 0, 0))
        allowed.check()
    with pytest.raises(RunFailed, match="are rarer"):
        naive.check()
    assert allowed.tokens_needed(0.05) > 4 * naive.tokens_needed(0.05)  # and says what the allowance costs
    assert allowed.tokens_needed(0.01) == math.inf
