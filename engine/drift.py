"""Trainer-sampler log-probability mismatch: its statistics over a step's tokens, and the limits at which a run fails.

For a sampled token: q is its log-probability as reported by the sampler, p as computed by the trainer before its first
optimizer step, H the entropy of the trainer's distribution (all nats, at the sampling temperature). d = p - q is 0
except for rounding. ``check_step`` tests d over the n tokens of one step:

            statistic                    limit                                      detects
    mean    mean |d|                     C u sqrt(L), see ``mean_limit``            other weights, another function
    tail    share of |d| > 8 C u sqrt(L) 1 in 1,000                                 the same on few tokens (a probe)
    mass    mean of exp(d) - 1           0 if q is normalised and tokens are        a token that q gives no probability,
                                         sampled from it                            such as a stop token left out
    slope   of d on x = (p + q) / 2 + H  0; a temperature 1 + e times the stated    a wrong temperature
                                         one gives slope e to first order

Each estimate is first moved towards 0 by Z standard errors, taken from the step's own squares, and then compared with
its limit. For a self-normalised sum of n conditionally symmetric terms P(sum > Z sqrt(sum of squares)) <= exp(-Z^2 / 2)
for any n and any size of the terms (de la Pena 1999); Z makes that FALSE_ALARM / 2. The count in the tail is compared
with the upper end of the binomial distribution at the same probability, by Chernoff's bound. ``mass`` and ``slope`` are
also allowed MASS_FLOOR and SLOPE_FLOOR, because in float32 any systematic difference of rounding is significant. The
slope's limit grows by half of sum d^2 / sum x^2, the largest effect of different rounding in trainer and sampler:
cov(d, x) = (var p - var q) / 2.

A sampler can report one distribution and sample from another; then d is 0. ``Surprise`` sums s = -q - H over all steps
of a run. Under the reported distribution it is a martingale, whatever was sampled before; stop tokens and length limits
are stopping times and do not change that. |sum s| is compared with Robbins' normal mixture boundary (Howard et al.
2021, "Time-uniform, nonparametric, nonasymptotic confidence sequences", proposition 5),

    sqrt((V + R) (ln((V + R) / R) + 2 ln(1 / FALSE_ALARM))) + A,    V = sum s^2,

which holds for all lengths of a run at once: the probability of a false alarm is FALSE_ALARM a run. (V estimates the
variance: a skewness g of s multiplies the probability by about exp(z^3 |g| / 3 sqrt n). R makes the test insensitive at
the beginning of a run, where that factor is large.) A allows for two known biases of s. Rounding: at most d^2 a token.
Selection: zero-variance groups and responses with advantage 0 are not trained on, so their s is unknown, and the kept
ones were selected by their outcome. For a sum S with variance W that is kept with probability k,
|E[S, kept]| <= sqrt(W k (1 - k)) (Cauchy-Schwarz), which for K kept and D dropped sums, V = K W, is sqrt(D V): A grows
by sqrt(V) (sqrt(dropped groups) + sqrt(dropped responses of other groups)) a step. If much is dropped, a small fault
can stay below the limit; ``tokens_needed`` is infinite then.

Detected with SmolLM2-135M in bfloat16 on 2,000 tokens: one layer whose weights are 10 % off (3 % is the size of
rounding), a reported temperature 2 % off, a stop token of mean probability 1.1 % left out. Exact equality of weights is
checked by ``engine.rollout.fingerprint``. In a run: sampling at a temperature 5 % too low after 7,400 tokens, 5 % too
high after 9,000, from the top 95 % after 3,000 (benchmarks/bench_drift.py --faults). The number is about
(10 / e)^2 / varentropy, so it grows as the policy becomes more certain; each row has it as surprise/needs_tok.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from isomorph.engine.types import Rollout, RunFailed, Sampling, StepDrift

FALSE_ALARM = 1e-9  # probability, for each test of a step and for the test of surprise over a run
Z = math.sqrt(2 * math.log(2 / FALSE_ALARM))  # 6.5 standard errors
TAIL_SHARE, TAIL_FACTOR = 1e-3, 8.0
MASS_FLOOR, SLOPE_FLOOR = 1e-3, 5e-3
MIXTURE = 500.0  # R, nats^2; the boundary is tightest at V = 40 R: 10^4 tokens of varentropy 2
FAULT = 0.05  # relative error of the temperature for which ``surprise/needs_tok`` is logged

# Unit roundoff of what a layer stores, times C. Each of L layers adds an error of its own to the residual stream, and
# independent errors add up to sqrt(L). bfloat16: sums are in float32, only results round. float32: sums of K ~ 1,000
# terms round, too, in an order that differs from kernel to kernel: sqrt(K) times as much. SmolLM2-135M (L = 30),
# builtin sampler against trainer (benchmarks/bench_drift.py): bfloat16 mean 0.028, 99.9 % 0.25 (limits 0.064, 0.51);
# float32 4.9e-6, 3.1e-5 (limits 9.8e-5, 7.8e-4).
_ROUNDING = {torch.bfloat16: 3 * 2.0**-8, torch.float32: 300 * 2.0**-24, torch.float64: 300 * 2.0**-24}

# -- histogram of |d|: a quantile that adds up over micro-batches and ranks
_PER_DECADE, _LOWEST, _DECADES = 40, -10, 12
_NUM_BINS = _PER_DECADE * _DECADES

_COUNTED = ("num_tok", "abs", "abs2", "mass", "mass2", "dx", "xx", "xxdd", "xxxd", "xxxx", "surprise", "surprise2")


class DriftSums:
    """Sums over the tokens of a step, from which ``step_drift`` computes its statistics; kept on the device."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(len(_COUNTED), dtype=torch.float64, device=device)
        self.histogram = torch.zeros(_NUM_BINS, dtype=torch.int64, device=device)
        self.largest = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, trainer_N: Tensor, sampler_N: Tensor, entropy_N: Tensor) -> None:
        """Adds N tokens: log-probabilities [N] of trainer and sampler, entropies [N] of the trainer; nats."""
        if not len(trainer_N):
            return
        p, q, entropy = (t.detach().double() for t in (trainer_N, sampler_N, entropy_N))
        d, x, s = p - q, (p + q) / 2 + entropy, -q - entropy
        mass, size = d.expm1(), d.abs()
        squares = (x * x, (x * d) ** 2, x**3 * d, x**4)
        terms = (torch.ones_like(d), size, d * d, mass, mass * mass, d * x, *squares, s, s * s)
        self.sums += torch.stack([term.sum() for term in terms])
        place = ((size.clamp(min=1e-300).log10() - _LOWEST) * _PER_DECADE).long().clamp(0, _NUM_BINS - 1)
        self.histogram += torch.bincount(place, minlength=_NUM_BINS)
        self.largest = torch.maximum(self.largest, size.max())

    def tensors(self) -> dict[str, Tensor]:
        """For a checkpoint."""
        return {"sums": self.sums.cpu(), "histogram": self.histogram.cpu(), "largest": self.largest.cpu()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        device = self.sums.device
        self.sums, self.histogram, self.largest = (
            tensors[name].to(device).clone() for name in ("sums", "histogram", "largest")
        )


def step_drift(parts: Sequence[Mapping[str, Tensor]], num_dropped_groups: int, num_dropped_seqs: int) -> StepDrift:
    """Returns the statistics of a step from the ``DriftSums.tensors`` of all ranks; NaN if it has no sampled token.

    ``num_dropped_groups``: zero-variance groups that were not trained on; ``num_dropped_seqs``: responses with
    advantage 0 of the other groups.
    """
    sums = torch.stack([part["sums"] for part in parts]).sum(0)
    histogram = torch.stack([part["histogram"] for part in parts]).sum(0)
    of = dict(zip(_COUNTED, sums.tolist(), strict=True))
    n, xx = of["num_tok"], of["xx"]
    if n == 0:
        return StepDrift()
    slope = of["dx"] / xx if xx else 0.0
    residual = of["xxdd"] - 2 * slope * of["xxxd"] + slope**2 * of["xxxx"]  # sum x^2 (d - slope x)^2
    return StepDrift(
        num_tok=int(n),
        mean=of["abs"] / n,
        square=of["abs2"] / n,
        p999=_quantile(histogram, 1 - TAIL_SHARE),
        largest=max(part["largest"].item() for part in parts),
        histogram=tuple(histogram.tolist()),
        mass=of["mass"] / n,
        mass_error=math.sqrt(of["mass2"]) / n,
        slope=slope,
        slope_error=math.sqrt(max(residual, 0.0)) / xx if xx else 0.0,
        rounding_slope=of["abs2"] / xx / 2 if xx else 0.0,
        surprise=of["surprise"],
        variance=of["surprise2"],
        slack=of["abs2"] + math.sqrt(of["surprise2"]) * (math.sqrt(num_dropped_groups) + math.sqrt(num_dropped_seqs)),
    )


def _edge(place: int) -> float:
    """Upper edge of a histogram bin, nats."""
    return 10.0 ** (_LOWEST + (place + 1) / _PER_DECADE)


def _quantile(histogram: Tensor, share: float) -> float:
    """Upper edge of the bin that contains the quantile: at most 6 % too large."""
    wanted = math.ceil(share * int(histogram.sum()))
    return _edge(int((histogram.cumsum(0) < wanted).sum()))


# -- one step
def mean_limit(dtype: torch.dtype, num_layers: int) -> float:
    """Largest mean |d| that rounding in ``dtype`` through ``num_layers`` layers explains, nats: C u sqrt(L)."""
    return _ROUNDING[dtype] * math.sqrt(num_layers)


def tail_count(num_tok: int) -> int:
    """Most of ``num_tok`` tokens that may be in the tail; more have a probability <= FALSE_ALARM (Chernoff)."""
    low, high = math.floor(TAIL_SHARE * num_tok), num_tok  # more than ``high`` is impossible

    def is_rare(count: int) -> bool:
        share = count / num_tok
        rest = (1 - share) * math.log((1 - share) / (1 - TAIL_SHARE)) if share < 1 else 0.0
        return num_tok * (share * math.log(share / TAIL_SHARE) + rest) > -math.log(FALSE_ALARM)

    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if is_rare(middle + 1) else (middle + 1, high)
    return low


def check_step(found: StepDrift, dtype: torch.dtype, num_layers: int, max_mean_drift: float | None) -> None:
    """Raises RunFailed if rounding does not explain the mismatch ``found``, or it is not finite. A step without sampled
    tokens passes.

    ``max_mean_drift``: nats, replaces ``mean_limit``, also in the limit of the tail; None: ``mean_limit``.
    """
    n = found.num_tok
    if n == 0:
        return
    if not math.isfinite(found.mean + found.surprise):  # compares as less than any limit
        raise RunFailed(f"{_of(n)} cannot be compared: of some the trainer's log-probability or entropy is not finite")
    limit = mean_limit(dtype, num_layers) if max_mean_drift is None else max_mean_drift
    kind = f"run.max_mean_drift; its default is what rounding in {str(dtype).removeprefix('torch.')} explains"
    error = math.sqrt(max(found.square - 2 * limit * found.mean + limit**2, 0.0) / n)  # of the mean of |d| - limit
    if found.mean - limit > Z * error:
        raise RunFailed(
            f"{_of(n)} differ by {found.mean:.2e} nats in the mean, more than {limit:.2g} ({kind}): {_OTHER_WEIGHTS}"
        )
    in_tail = sum(c for place, c in enumerate(found.histogram) if _edge(place - 1) > TAIL_FACTOR * limit)
    if in_tail > (most := tail_count(n)):
        raise RunFailed(
            f"{_of(n)} differ by more than {TAIL_FACTOR * limit:.2g} nats ({TAIL_FACTOR:g} times {kind}) on {in_tail} "
            f"of them, at most {most} may: {_OTHER_WEIGHTS}"
        )
    slope_limit = SLOPE_FLOOR + found.rounding_slope
    if abs(found.slope) - Z * found.slope_error > slope_limit:
        raise RunFailed(
            f"{_of(n)} differ as if the sampler's were at another temperature, {found.slope:+.2%} off; rounding "
            f"explains at most {slope_limit:.2%}: compare sampling.temperature with what the sampler scales its logits "
            "by (the temperature of a generation config, a softcap), and check its weights"
        )
    if abs(found.mass) - Z * found.mass_error > MASS_FLOOR:
        raise RunFailed(
            f"{_of(n)} are over different sets of tokens: the mean of the probability ratio trainer / sampler must be "
            f"1 within {MASS_FLOOR:.1%}, got {1 + found.mass:.2%}: the sampler leaves tokens out (a stop token, top-k, "
            "top-p, min-p, banned words), or does not sample from what it reports"
        )


_OTHER_WEIGHTS = (
    "the sampler does not compute with the trainer's weights (a layer is stale), or not the same function "
    "(temperature, top-k or top-p of a generation config)"
)


def _of(num_tok: int) -> str:
    return f"trainer and sampler log-probabilities of {num_tok} sampled tokens"


# -- a run
@dataclass(frozen=True, slots=True)
class Surprise:
    """Running sums of s = -q - H over the sampled tokens of a run; kept in ``RunState.totals``."""

    num_tok: float = 0.0
    total: float = 0.0  # sum of s, nats
    variance: float = 0.0  # sum of s^2
    slack: float = 0.0  # A

    @classmethod
    def of(cls, totals: Mapping[str, float]) -> "Surprise":
        return cls(*(totals.get(f"surprise/{name}", 0.0) for name in cls.__slots__))

    def totals(self) -> dict[str, float]:
        return {f"surprise/{name}": getattr(self, name) for name in self.__slots__}

    def plus(self, found: StepDrift) -> "Surprise":
        if found.num_tok == 0:
            return self
        return Surprise(
            self.num_tok + found.num_tok,
            self.total + found.surprise,
            self.variance + found.variance,
            self.slack + found.slack,
        )

    @property
    def z(self) -> float:
        """(sum of s) in standard errors; positive: the sampled tokens are less probable than reported."""
        return self.total / math.sqrt(self.variance) if self.variance else math.nan

    @property
    def limit(self) -> float:
        """Largest |z| that chance, rounding and selection explain."""
        return (_boundary(self.variance) + self.slack) / math.sqrt(self.variance) if self.variance else math.nan

    def tokens_needed(self, error: float = FAULT) -> float:
        """Number of tokens like those so far after which a temperature off by ``error`` is detected with probability
        0.999; may be infinite. Such a temperature gives s the mean error * varentropy, E s^2, to first order.
        """
        return self.tokens_until(abs(error) * self.variance / self.num_tok) if self.num_tok else math.nan

    def tokens_until(self, shift: float) -> float:
        """The same for a fault that changes the mean of s by ``shift``, nats."""
        each = self.variance / self.num_tok
        excess = shift - self.slack / self.num_tok
        if excess <= 0:
            return math.inf
        n = 1.0
        for _ in range(100):  # a contraction: the boundary grows as sqrt(n log n)
            n = (_boundary(n * each) + 3.1 * math.sqrt(n * each)) / excess
        return n

    def check(self) -> None:
        """Raises RunFailed if the tokens were not sampled from the log-probabilities that the sampler reports."""
        if self.variance and abs(self.z) > self.limit:
            way = "rarer" if self.z > 0 else "more probable"
            raise RunFailed(
                f"the {self.num_tok:.0f} tokens sampled so far are {way} than the sampler's own log-probabilities say: "
                f"the mean of -log q - entropy is {self.total / self.num_tok:+.3f} nats a token, {abs(self.z):.1f} "
                f"standard errors, at most {self.limit:.1f} may be chance: it samples from another distribution than "
                "it reports (temperature, top-k, top-p, min-p or a penalty of a generation config), and the policy was "
                "trained on these samples: correct the sampler's settings and start a new run"
            )


def _boundary(variance: float) -> float:
    whole = variance + MIXTURE
    return math.sqrt(whole * (math.log(whole / MIXTURE) + 2 * math.log(1 / FALSE_ALARM)))


# -- ends
def check_ends(rollouts: Sequence[Rollout], sampling: Sampling) -> None:
    """Raises RunFailed if a response does not end as its ``finish`` says: a stop token was dropped or ignored."""
    stops = torch.tensor(sampling.stop_ids, dtype=torch.int64)
    for rollout in rollouts:
        *earlier, turn = rollout.turns
        for ended in earlier:
            at = torch.isin(ended, stops).nonzero().flatten().tolist()
            if at != [len(ended) - 1] and not (sampling.stop and not at):
                raise RunFailed(
                    f"response {rollout.sample} to prompt {rollout.prompt_id}: every turn before the last must end "
                    "with its stop token, and hold no other: the sampler drops stop tokens, or ignores them"
                )
        at = torch.isin(turn, stops).nonzero().flatten().tolist()
        last, n = len(turn) - 1, len(rollout.token_ids)
        if rollout.finish == "stop":
            wanted, is_right = "its stop token last, and no other", at == [last] or (bool(sampling.stop) and not at)
        else:
            wanted, is_right = (
                f"{sampling.max_new_tok} tokens, none of which stops",
                not at and n == sampling.max_new_tok,
            )
        if not is_right:
            raise RunFailed(
                f"response {rollout.sample} to prompt {rollout.prompt_id} with finish={rollout.finish!r} must hold "
                f"{wanted}, got {n} tokens with stop tokens at {at}: the sampler drops stop tokens, or ignores them"
            )


def check_kept(rollouts: Sequence[Rollout], sampling: Sampling) -> None:
    """Raises RunFailed unless each token comes with the set it was drawn from, exactly where that was truncated."""
    is_on, keys = sampling.truncation.is_on, sampling.truncation._asdict().items()
    for rollout in rollouts:
        kept, n = rollout.kept, len(rollout.token_ids)
        if is_on and kept is not None and len(kept) == n and bool(kept.has(rollout.token_ids).all()):
            continue
        if is_on or kept is not None:
            wanted = f"a set of kept tokens for each of its {n} tokens, which holds it" if is_on else "no kept tokens"
            raise RunFailed(
                f"response {rollout.sample} to prompt {rollout.prompt_id} must have {wanted}, with "
                f"{', '.join(f'{name} = {value}' for name, value in keys)}, got "
                f"{'none' if kept is None else f'{len(kept)} sets'}: the sampler must obey Sampling.truncation and "
                "return Rollout.kept"
            )
