"""A discrete simulation of a step: draw, judge, learn, publish, on one device or several.

    python benchmarks/step_simulation.py --take RUN       a run's lengths and times ->
                                                       benchmarks/results/step_lengths.jsonl
    python benchmarks/step_simulation.py [--ranks 1 2 4]  prints: simulated against measured; idle shares by form

``--take`` needs a finished run with the built-in sampler on one rank. Lengths are tokens of responses by group, from
completions/step-N.jsonl, encoded again with the run's tokenizer; a step whose lengths do not add up to its
``tok/response`` is refused.

The simulation knows four durations, fitted to the steps whose lengths were not written (least squares):

    a decoding step    fixed + rows * token          rows: responses that are being decoded
    a prompt           its tokens * prefill
    learning           fixed + packed tokens * learn
    the rest           the mean of all other phases

Then the steps whose lengths were written are simulated, and compared with their measured seconds. Forms:

    synchronous     every rank draws its share, all wait for the last one, learn together, and publish
    refilled        groups whose rewards are all equal are drawn anew before learning, in further rounds
    one step off    some ranks draw step k + 1 while the others learn step k; weights are one step old
                    (not in isomorph, where with sampler.overlap every rank does both at once)

Idle: the share of all ranks' seconds in which a rank neither draws, learns, judges nor publishes. Rows: the mean share
of a rank's decoding slots that are filled while it draws. Collectives take no time here: docs/scale.md has their bytes.
"""

import argparse
import json
import random
import statistics
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).parents[1]
LENGTHS = ROOT / "benchmarks" / "results" / "step_lengths.jsonl"
PHASES = ("generate", "judge", "update")  # of which the simulation has its own durations


class Group(NamedTuple):
    """A prompt's tokens, and those of each response to it."""

    prompt: int
    lengths: tuple[int, ...]
    is_flat: bool = False  # all rewards equal

    @property
    def tok(self) -> int:
        """Packed tokens: the prompt once; the last token of a response is predicted, and never read."""
        return self.prompt + sum(self.lengths) - len(self.lengths)


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Seconds; ``slots``: responses that a rank decodes at once."""

    decode_fixed: float
    decode_row: float
    prefill_tok: float
    learn_fixed: float
    learn_tok: float
    rest: float = 0.0  # of every step, on every rank: publish, packing, records
    judge: float = 0.0  # of a response, one after the other, beside the decoding
    slots: int = 256


class Drawn(NamedTuple):
    """What a rank did to draw its groups."""

    seconds: float  # until the last response has ended
    waited: float  # more, until the last reward is there
    row_share: float  # of the decoding slots that were filled, over the decoding steps


class Step(NamedTuple):
    """A step on all ranks."""

    seconds: float
    idle: float
    row_share: float
    num_trained: int  # groups with a gradient


def draw(groups: Sequence[Group], costs: Costs) -> Drawn:
    """Continuous batching on one rank: a free slot takes the next response; a group's prompt comes first."""
    waiting = deque((i, n) for i, group in enumerate(groups) for n in group.lengths)
    running: list[list[int]] = []  # [group, tokens left]
    left = [len(group.lengths) for group in groups]
    now = judged = filled = steps = 0.0
    begun: set[int] = set()
    while waiting or running:
        while waiting and len(running) < costs.slots:
            i, length = waiting.popleft()
            running.append([i, length])
            if i not in begun:
                begun.add(i)
                now += groups[i].prompt * costs.prefill_tok
        together = min(left_tok for _, left_tok in running)
        now += together * (costs.decode_fixed + len(running) * costs.decode_row)
        filled, steps = filled + together * len(running), steps + together
        for slot in running:
            slot[1] -= together
        for i in [i for i, left_tok in running if not left_tok]:
            left[i] -= 1
            if not left[i]:
                judged = max(judged, now) + len(groups[i].lengths) * costs.judge
        running = [slot for slot in running if slot[1]]
    num_slots = min(costs.slots, sum(len(group.lengths) for group in groups))
    return Drawn(now, max(0.0, judged - now), filled / (steps * num_slots) if steps else 1.0)


def learn(groups: Sequence[Group], num_ranks: int, costs: Costs) -> list[float]:
    """Seconds of each rank: the largest group first, each to the rank with the fewest tokens."""
    tok = [0] * num_ranks
    for group in sorted(groups, key=lambda group: group.tok, reverse=True):
        tok[tok.index(min(tok))] += group.tok
    return [costs.learn_fixed + n * costs.learn_tok for n in tok]


def synchronous(groups: Sequence[Group], num_ranks: int, costs: Costs, refills: Sequence[Sequence[Group]] = ()) -> Step:
    """One step of ``groups``. ``refills``: further rounds, each drawn by all ranks after the one before is complete.

    Groups of the first round that are flat are replaced, in turn, by those of the refills.
    """
    busy, seconds, shares, kept = [0.0] * num_ranks, 0.0, [], [group for group in groups if not group.is_flat]
    for groups_of_round in (groups, *refills):
        drawn = [draw(groups_of_round[rank::num_ranks], costs) for rank in range(num_ranks)]
        seconds += max(one.seconds + one.waited for one in drawn)
        busy = [b + one.seconds + one.waited for b, one in zip(busy, drawn, strict=True)]
        shares += [one.row_share for one in drawn if one.seconds]
        if groups_of_round is not groups:
            kept += [group for group in groups_of_round if not group.is_flat]
    learned = learn(kept, num_ranks, costs)
    seconds += max(learned) + costs.rest
    busy = [b + one + costs.rest for b, one in zip(busy, learned, strict=True)]
    return Step(seconds, 1 - sum(busy) / (num_ranks * seconds), statistics.mean(shares), len(kept))


def one_step_off(groups: Sequence[Group], num_drawing: int, num_learning: int, costs: Costs) -> Step:
    """A step of the steady state: both parts begin together and the slower one ends it; then weights are published."""
    drawn = [draw(groups[rank::num_drawing], costs) for rank in range(num_drawing)]
    kept = [group for group in groups if not group.is_flat]
    learned = learn(kept, num_learning, costs)
    seconds = max(*learned, *(one.seconds + one.waited for one in drawn)) + costs.rest
    busy = sum(learned) + sum(one.seconds + one.waited for one in drawn) + (num_drawing + num_learning) * costs.rest
    num_ranks = num_drawing + num_learning
    share = statistics.mean(one.row_share for one in drawn)
    return Step(seconds, 1 - busy / (num_ranks * seconds), share, len(kept))


# -- measured
def take(run: Path) -> list[dict[str, Any]]:
    """A row for every step of the run that sampled. Raises SystemExit where the lengths do not add up."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    rows = []
    for row in map(json.loads, (run / "steps.jsonl").read_text().splitlines()):
        file = run / "completions" / f"step-{row['step']:08d}.jsonl"
        if not row["time/generate_s"] or row["stage"] in _supervised(run) or not row["updates"]:
            continue
        found = {"step": row["step"], "prompt_tok": row["tok/prompt"], "response_tok": row["tok/response"]}
        found |= {"packed_tok": row["tok/trunk"], "groups": row["groups/all"], "flat": row["groups/flat"]}
        found |= {f"{phase}_s": row[f"time/{phase}_s"] for phase in PHASES} | {"step_s": row["time/step_s"]}
        found["lengths"] = _lengths(file, tokenizer, row["tok/response"]) if file.is_file() else None
        rows.append(found)
    return rows


def _supervised(run: Path) -> set[str]:
    stages = json.loads((run / "run.json").read_text())["recipe"]["stage"]
    return {stage["name"] for stage in stages if stage["objective"]["name"] == "sft"}


def _lengths(file: Path, tokenizer: Any, num_tok: int) -> list[dict[str, Any]]:
    groups: dict[int, dict[str, Any]] = {}
    for row in map(json.loads, file.read_text().splitlines()):
        ids = tokenizer(row["text"], add_special_tokens=False)["input_ids"]
        prompt = len(tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]) + 1
        group = groups.setdefault(row["prompt_id"], {"prompt": prompt, "lengths": [], "rewards": []})
        group["lengths"].append(len(ids) + (row["finish"] == "stop"))
        group["rewards"].append(row["reward"])
    found = sum(sum(group["lengths"]) for group in groups.values())
    if found != num_tok:
        raise SystemExit(f"{file.name}: the texts have {found} tokens, the step had {num_tok}")
    return [
        {"prompt": group["prompt"], "lengths": group["lengths"], "is_flat": len(set(group["rewards"])) == 1}
        for group in groups.values()
    ]


def groups_of(row: dict[str, Any]) -> list[Group]:
    return [Group(one["prompt"], tuple(one["lengths"]), one["is_flat"]) for one in row["lengths"]]


def fitted(rows: Iterable[dict[str, Any]], num_decoded: float) -> Costs:
    """Durations by least squares on rows without lengths; ``num_decoded``: decoding steps of each, as of the others.

    Prompts of one recipe have nearly the same length: their prefill is in the fixed part of a decoding step.
    """
    known = list(rows)
    fixed, per_row = _line([row["response_tok"] for row in known], [row["generate_s"] for row in known])
    at_once, per_tok = _line([row["packed_tok"] for row in known], [row["update_s"] for row in known])
    rest = statistics.mean(row["step_s"] - row["generate_s"] - row["update_s"] for row in known)
    return Costs(
        decode_fixed=fixed / num_decoded,
        decode_row=per_row,
        prefill_tok=0.0,
        learn_fixed=at_once,
        learn_tok=per_tok,
        rest=rest,
    )


def _line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Intercept and slope by least squares; where the intercept would be negative, a line through the origin."""
    slope, intercept = np.polyfit(x, y, 1)
    if intercept >= 0:
        return float(intercept), float(slope)
    return 0.0, float(np.dot(x, y) / np.dot(x, x))


class Check(NamedTuple):
    """Simulated against measured steps."""

    num_fitted: int
    num_steps: int
    error: float  # of the sum of all steps' seconds, relative
    median_error: float  # of one step, absolute and relative
    scatter: float  # standard deviation of the fitted steps' seconds over their mean: what no simulation can say
    costs: Costs


def checked(rows: Sequence[dict[str, Any]]) -> Check:
    """Fits to the steps without lengths, and simulates the others."""
    others, known = [row for row in rows if row["lengths"] is None], [row for row in rows if row["lengths"]]
    longest = [max(n for group in groups_of(row) for n in group.lengths) for row in known]
    costs = fitted(others, statistics.mean(longest))
    found = [synchronous(groups_of(row), 1, costs).seconds for row in known]
    facts = [row["step_s"] for row in known]
    errors = [abs(one / fact - 1) for one, fact in zip(found, facts, strict=True)]
    seconds = [row["step_s"] for row in others]
    return Check(
        num_fitted=len(others),
        num_steps=len(known),
        error=sum(found) / sum(facts) - 1,
        median_error=statistics.median(errors),
        scatter=statistics.stdev(seconds) / statistics.mean(seconds),
        costs=costs,
    )


# -- forms
class Form(NamedTuple):
    """Means over simulated steps."""

    name: str
    seconds: float
    seconds_per_group: float  # with a gradient, of all ranks
    idle: float
    row_share: float


def forms(
    pool: Sequence[Group], num_ranks: int, costs: Costs, *, prompts: int, rounds: int = 3, steps: int = 50
) -> list[Form]:
    """The three forms on ``num_ranks``, with ``prompts`` groups of ``pool`` a rank and step, drawn with replacement."""
    rng = random.Random(0)

    def drawn(num: int) -> list[Group]:
        return rng.choices(pool, k=num)

    made: dict[str, list[Step]] = {"synchronous": [], "refilled": []}
    for _ in range(steps):
        groups, refills = drawn(prompts * num_ranks), []
        made["synchronous"].append(synchronous(groups, num_ranks, costs))
        flat = sum(group.is_flat for group in groups)
        while flat and len(refills) < rounds:
            refills.append(drawn(flat))
            flat = sum(group.is_flat for group in refills[-1])
        made["refilled"].append(synchronous(groups, num_ranks, costs, refills))
        for num_drawing in range(1, num_ranks):
            name = f"one step off, {num_drawing} draw and {num_ranks - num_drawing} learn"
            made.setdefault(name, []).append(one_step_off(groups, num_drawing, num_ranks - num_drawing, costs))
    found = [_form(name, simulated) for name, simulated in made.items()]
    split = sorted(found[2:], key=lambda form: form.seconds)
    return [*found[:2], *split[:1]]


def _form(name: str, steps: Sequence[Step]) -> Form:
    seconds = sum(step.seconds for step in steps)
    return Form(
        name=name,
        seconds=seconds / len(steps),
        seconds_per_group=seconds / max(1, sum(step.num_trained for step in steps)),
        idle=sum(step.idle * step.seconds for step in steps) / seconds,
        row_share=statistics.mean(step.row_share for step in steps),
    )


def load_rows() -> list[dict[str, Any]]:
    return [json.loads(line) for line in LENGTHS.read_text().splitlines()]


def pool_of(rows: Sequence[dict[str, Any]]) -> list[Group]:
    return [group for row in rows if row["lengths"] for group in groups_of(row)]


def check_text(check: Check) -> str:
    """The result of ``checked`` in a sentence."""
    return (
        f"{check.num_steps} steps of {check.num_fitted + check.num_steps} simulated with durations fitted to the other "
        f"{check.num_fitted}: their sum {check.error:+.1%} of the measured one, a step {check.median_error:.0%} off "
        f"(median); the run's own steps scatter by {check.scatter:.0%}"
    )


def table(rows: Sequence[dict[str, Any]], costs: Costs, ranks: Sequence[int], prompts: int) -> str:
    """Markdown: seconds and idle shares by form and number of ranks, relative to one synchronous rank."""
    lines = [
        "| ranks | form | step, s | groups with a gradient / s | idle | rows filled while drawing |",
        "| ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    for num_ranks in ranks:
        for form in forms(pool_of(rows), num_ranks, costs, prompts=prompts):
            lines.append(
                f"| {num_ranks} | {form.name} | {form.seconds:.2f} | {1 / form.seconds_per_group:.1f} | "
                f"{abs(form.idle):.1%} | {form.row_share:.0%} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--take", type=Path, metavar="RUN")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--prompts", type=int, default=16, help="a rank and step")
    args = parser.parse_args()
    if args.take is not None:
        LENGTHS.write_text("".join(json.dumps(row) + "\n" for row in take(args.take)))
    rows = load_rows()
    check = checked(rows)
    print(check_text(check), end="\n\n")
    print(table(rows, check.costs, args.ranks, args.prompts))


if __name__ == "__main__":
    main()
