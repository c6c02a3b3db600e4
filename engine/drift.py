"""Does the sampler draw from the policy that the trainer computes? Statistics of each step's tokens, and their limits.

Of a sampled token: q its log-probability as the sampler reports it, p as the trainer computes it before its first
update, H the entropy of the trainer's distribution (all nats, at the sampling temperature). d = p - q is 0 but for
rounding. ``check_step`` judges d over the n tokens of one step:

    mean    mean |d|                     at most C u sqrt(L), see ``mean_limit``    other weights, another function
    tail    share of |d| > 8 C u sqrt(L) at most 1 in 1,000                         the same on few tokens (a probe)
    mass    mean of exp(d) - 1           0: q is normalised, and tokens are drawn   a token that q gives nothing to,
                                         from it                                    such as a stop token left out
    slope   of d on x = (p + q) / 2 + H  0: a temperature 1 + e times the stated    the reported temperature
                                         one gives slope e to first order

A limit is never compared with an estimate but with what the estimate proves: it is moved towards 0 by Z standard
errors, taken from the step's own squares. For a self-normalised sum of n conditionally symmetric terms
P(sum > Z sqrt(sum of squares)) <= exp(-Z^2 / 2) whatever n and whatever the terms' size (de la Pena 1999); Z makes that
FALSE_ALARM / 2. The tail's count is compared with the binomial distribution's upper end at the same probability, by
Chernoff's bound. ``mass`` and ``slope`` have a floor as well (MASS_FLOOR, SLOPE_FLOOR), because in float32 any
systematic difference of rounding is significant; the slope's grows by half of sum d^2 / sum x^2, the most that
rounding can do where trainer and sampler round differently: cov(d, x) = (var p - var q) / 2.

A sampler can report one distribution and draw from another: d is 0 then. ``Surprise`` adds up s = -q - H over all steps
of a run. Under the reported distribution it is a martingale whatever was drawn before, and stop tokens and length
limits are stopping times, which change nothing. |sum s| is compared with Robbins' normal mixture boundary (Howard et
al. 2021, "Time-uniform, nonparametric, nonasymptotic confidence sequences", proposition 5),

    sqrt((V + R) (ln((V + R) / R) + 2 ln(1 / FALSE_ALARM))) + A,    V = sum s^2,

which holds at all times at once: a run of any length trips falsely with probability FALSE_ALARM. (V stands for the
variance, which it estimates: a skewness g of s multiplies the probability by about exp(z^3 |g| / 3 sqrt n). R keeps a
run's beginning, where that is much, from counting.) A allows for what is known to
bias s: rounding, at most d^2 a token; and selection. Groups without variance of rewards, and responses without an
advantage, are not learned from, so their s is not known, and what is kept was chosen by its outcome. For a sum S with
variance W that is kept with probability k, |E[S, kept]| <= sqrt(W k (1 - k)) (Cauchy-Schwarz), which for K kept and D
dropped sums, V = K W, comes to sqrt(D V): A grows by sqrt(V) (sqrt(dropped groups) + sqrt(dropped responses of others))
a step. Where much is dropped a small fault can so stay below the limit; ``tokens_needed`` then says infinity.

What is seen, with SmolLM2-135M in bfloat16 on 2,000 tokens: one layer whose weights are 10 % off (3 % are rounding's
size), a reported temperature 2 % off, a stop token of mean probability 1.1 % left out. Exact equality of the weights is
checked by ``engine.rollout.fingerprint``. On a run: drawing at a temperature 5 % off after 7,400 tokens
(below) or 9,000 (above), from the top 95 % after 3,000 (benchmarks/bench_drift.py --faults). The number is about
(10 / e)^2 / varentropy, so a policy that has become certain needs more; each row says how many.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from isomorph.engine.types import Rollout, RunFailed, Sampling, StepDrift

FALSE_ALARM = 1e-9  # of each test, a step; of the test of surprise, a run
Z = math.sqrt(2 * math.log(2 / FALSE_ALARM))  # 6.5 standard errors
TAIL_SHARE, TAIL_FACTOR = 1e-3, 8.0
MASS_FLOOR, SLOPE_FLOOR = 1e-3, 5e-3
MIXTURE = 500.0  # nats^2; the boundary is tightest where V is some 40 times this: 10^4 tokens of varentropy 2
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
    """What is added up over the tokens of a step, on the device until read."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(len(_COUNTED), dtype=torch.float64, device=device)
        self.histogram = torch.zeros(_NUM_BINS, dtype=torch.int64, device=device)
        self.largest = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, trainer_N: Tensor, sampler_N: Tensor, entropy_N: Tensor) -> None:
        """Of N tokens: log-probability by trainer and by sampler, and entropy by the trainer; nats."""
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
    """The statistics of a step from the ``DriftSums.tensors`` of all ranks; NaN where it has no sampled token.

    ``num_dropped_groups``: drawn and not learned from, for their rewards; ``num_dropped_seqs``: of the other groups.
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
    """Upper edge of a bin, nats."""
    return 10.0 ** (_LOWEST + (place + 1) / _PER_DECADE)


def _quantile(histogram: Tensor, share: float) -> float:
    """Upper edge of the bin that holds it: at most 6 % too large."""
    wanted = math.ceil(share * int(histogram.sum()))
    return _edge(int((histogram.cumsum(0) < wanted).sum()))


# -- one step
def mean_limit(dtype: torch.dtype, num_layers: int) -> float:
    """Largest mean |d| that rounding in ``dtype`` through ``num_layers`` layers explains, nats: C u sqrt(L)."""
    return _ROUNDING[dtype] * math.sqrt(num_layers)


def tail_count(num_tok: int) -> int:
    """Most of ``num_tok`` tokens that may lie in the tail: more has probability FALSE_ALARM at most, by Chernoff."""
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
    """Raises RunFailed where ``found`` cannot be rounding. A step without sampled tokens passes.

    ``max_mean_drift``: nats, in place of ``mean_limit``; the tail's limit follows it.
    """
    n = found.num_tok
    if n == 0:
        return
    limit = mean_limit(dtype, num_layers) if max_mean_drift is None else max_mean_drift
    kind = f"run.max_mean_drift; by default what rounding in {str(dtype).removeprefix('torch.')} explains"
    error = math.sqrt(max(found.square - 2 * limit * found.mean + limit**2, 0.0) / n)  # of the mean of |d| - limit
    if found.mean - limit > Z * error:
        raise RunFailed(
            f"{_of(n)} log-probability and the trainer's differ by {found.mean:.2e} nats in the mean, more than "
            f"{limit:.2g} ({kind}): {_OTHER_WEIGHTS}"
        )
    in_tail = sum(c for place, c in enumerate(found.histogram) if _edge(place - 1) > TAIL_FACTOR * limit)
    if in_tail > (most := tail_count(n)):
        raise RunFailed(
            f"{_of(n)} log-probability and the trainer's differ by more than {TAIL_FACTOR * limit:.2g} nats on "
            f"{in_tail} of them, at most {most} may ({TAIL_FACTOR:g} times {kind}): {_OTHER_WEIGHTS}"
        )
    slope_limit = SLOPE_FLOOR + found.rounding_slope
    if abs(found.slope) - Z * found.slope_error > slope_limit:
        raise RunFailed(
            f"{_of(n)} log-probability is the trainer's at another temperature: they differ by {found.slope:+.2%} of "
            f"what a token's lies above the mean, at most {slope_limit:.2%} is rounding: compare sampling.temperature "
            "with what the sampler scales its logits by (a generation config's temperature, a softcap), and its weights"
        )
    if abs(found.mass) - Z * found.mass_error > MASS_FLOOR:
        raise RunFailed(
            f"{_of(n)} probabilities and the trainer's do not belong to the same tokens: the trainer's are "
            f"{found.mass:+.2%} of the sampler's off in the mean, which must be 0 within {MASS_FLOOR:.1%}: the sampler "
            "leaves tokens out (a stop token, top-k, top-p, min-p, banned words), or does not draw what it reports"
        )


_OTHER_WEIGHTS = (
    "the sampler does not compute with the trainer's weights (stale ones, in a layer at least), or not the trainer's "
    "function (temperature, top-k or top-p of a generation config)"
)


def _of(num_tok: int) -> str:
    return f"of the {num_tok} sampled tokens the sampler's"


# -- a run
@dataclass(frozen=True, slots=True)
class Surprise:
    """Running sums over the sampled tokens of a run; one is kept in ``RunState.totals``."""

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
        """Standard errors by which surprise exceeds entropy; negative: falls short of it."""
        return self.total / math.sqrt(self.variance) if self.variance else math.nan

    @property
    def limit(self) -> float:
        """Of |z|."""
        return (_boundary(self.variance) + self.slack) / math.sqrt(self.variance) if self.variance else math.nan

    def tokens_needed(self, error: float = FAULT) -> float:
        """Tokens like those so far until a temperature off by ``error`` is seen, 999 times in 1,000; may be infinite.

        Its mean of s is error times the varentropy, E s^2, to first order.
        """
        return self.tokens_until(abs(error) * self.variance / self.num_tok) if self.num_tok else math.nan

    def tokens_until(self, shift: float) -> float:
        """The same for a fault that moves the mean of s by ``shift``, nats."""
        each = self.variance / self.num_tok
        excess = shift - self.slack / self.num_tok
        if excess <= 0:
            return math.inf
        n = 1.0
        for _ in range(100):  # a contraction: the boundary grows as sqrt(n log n)
            n = (_boundary(n * each) + 3.1 * math.sqrt(n * each)) / excess
        return n

    def check(self) -> None:
        """Raises RunFailed where the tokens cannot have been drawn from what is reported of them."""
        if self.variance and abs(self.z) > self.limit:
            way = "rarer" if self.z > 0 else "more probable"
            raise RunFailed(
                f"the {self.num_tok:.0f} tokens that the sampler drew so far are {way} than its own log-probabilities "
                f"say: surprise and entropy differ by {self.total / self.num_tok:+.3f} nats a token, {abs(self.z):.1f} "
                f"standard errors, at most {self.limit:.1f} is chance: it draws from another distribution than it "
                "reports (temperature, top-k, top-p, min-p or a penalty of a generation config), and all that was "
                "learned was learned from it: start anew with a sampler that does not"
            )


def _boundary(variance: float) -> float:
    whole = variance + MIXTURE
    return math.sqrt(whole * (math.log(whole / MIXTURE) + 2 * math.log(1 / FALSE_ALARM)))


# -- ends
def check_ends(rollouts: Sequence[Rollout], sampling: Sampling) -> None:
    """Raises RunFailed where a response's end is not what its ``finish`` says: a stop token was dropped or ignored."""
    stops = torch.tensor(sampling.stop_ids, dtype=torch.int64)
    for rollout in rollouts:
        at = torch.isin(rollout.token_ids, stops).nonzero().flatten().tolist()
        last, n = len(rollout.token_ids) - 1, len(rollout.token_ids)
        if rollout.finish == "stop":
            wanted, is_right = "its stop token last, and no other", at == [last]
        else:
            wanted, is_right = (
                f"{sampling.max_new_tok} tokens, none of which stops",
                not at and n == sampling.max_new_tok,
            )
        if not is_right:
            raise RunFailed(
                f"response {rollout.sample} to prompt {rollout.prompt_id} ended by {rollout.finish!r} must hold "
                f"{wanted}, got {n} with stop tokens at {at}: the sampler drops stop tokens, or passes over them"
            )
