"""Reads the finish time of every step out of a response: our two demonstrations' forms, and what is near them.

compact     3: 1 4, 2 7 > 7 + 5 = 12            sentences   Step 3 takes 5 min ...: ... is finished at 7 + 5 = 12 min.
listed      1: 0; 2: 0; 3: 1 2. and then as compact; that first sentence has no times and is passed over

What a model wrote may miss steps, repeat them or mix forms: an entry that cannot be read is left out, and of a step
that is given twice the last one counts.
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

_NUMBER = r"\d{1,12}(?:\.\d{1,6})?"
_NAME = r"(\d{1,6}|(?-i:[A-Z]))\b"  # of a step: a number or a capital, so that "the last step is" names none
_COMPACT = re.compile(rf"^\W*(?:step|node)?\s*{_NAME}\s*:(.*?)({_NUMBER})\s*[a-z]*\W*$", re.IGNORECASE)
_KNOWN = re.compile(rf"{_NAME}\s+({_NUMBER})(?=\s|,|$)")
_SUBJECT = re.compile(rf"\b(?:step|node)\s+{_NAME}", re.IGNORECASE)
_END = re.compile(
    rf"\b(?:finish(?:es|ed)?|ends?|ended|done|completed?|completes)\s+(?:at|by|after|in)\s+(?:time\s+)?"
    rf"((?:{_NUMBER}\s*[+]\s*)*{_NUMBER}(?:\s*[a-z]*\s*=\s*{_NUMBER})?)",
    re.IGNORECASE,
)
_LEADS = re.compile(rf"\b(?:step|node)\s+{_NAME}\s*\((?:finished at|at)?\s*({_NUMBER})[^)]*\)", re.IGNORECASE)
_LISTING = re.compile(r"\s*(?:\w+\s*:(?:\s*\w+)+\s*;\s*)*\w+\s*:(?:\s*\w+)+\s*\.(?=\s)")
_ANSWER = re.compile(r"<answer>.*?(?:</answer>|$)|</?think>", re.DOTALL)


@dataclass(frozen=True, slots=True)
class TracedStep:
    """What a response says of one step."""

    finish: float
    duration: float | None  # None: not stated
    predecessors: tuple[str, ...]


def read_trace(text: str) -> dict[str, TracedStep]:
    """Name of a step -> what ``text`` says of it; {} where no step can be read."""
    found: dict[str, TracedStep] = {}
    said = _ANSWER.sub("\n", text)
    listing = _LISTING.match(said)
    for entry in re.split(r"[;\n]", said[listing.end() :] if listing else said):
        read = _sentence(entry) or _compact(entry)
        if read is not None:
            found[read[0]] = read[1]
    return found


def _compact(entry: str) -> tuple[str, TracedStep] | None:
    match = _COMPACT.match(entry)
    if match is None:
        return None
    name, between, finish = match.groups()
    known, arrow, addition = between.rpartition(">")
    predecessors = tuple(before for before, _ in _KNOWN.findall(known.rpartition("=")[2])) if arrow else ()
    return name, TracedStep(float(finish), _added(addition + finish), predecessors)


def _sentence(entry: str) -> tuple[str, TracedStep] | None:
    leads = tuple(name for name, _ in _LEADS.findall(entry))
    bare = re.sub(r"\([^)]*\)", "", entry)
    subject, ends = _SUBJECT.search(bare), _END.findall(bare)
    if subject is None or not ends:
        return None
    sum_text = ends[-1]
    return subject[1], TracedStep(float(re.findall(_NUMBER, sum_text)[-1]), _added(sum_text), leads)


def _added(text: str) -> float | None:
    """The second summand of ``7 + 5 = 12``."""
    found = re.search(rf"{_NUMBER}\s*[+]\s*({_NUMBER})\s*[a-z]*\s*=", text)
    return float(found[1]) if found else None


def alignment(one: Mapping[str, TracedStep], other: Mapping[str, TracedStep]) -> float | None:
    """How far two traces of isomorphic questions agree, 0..1; None where one of them has no step.

    The share of all steps named in either whose finish times are equal. Where no name is common (the paper's code
    numbers its nodes anew) and where units differ, times count as shares of the latest one, and as a multiset.
    """
    if not one or not other:
        return None
    if one.keys() & other.keys():
        same = sum(name in other and one[name].finish == other[name].finish for name in one)
        return same / len(one.keys() | other.keys())
    ours, theirs = _shares(one), _shares(other)
    return (ours & theirs).total() / (ours | theirs).total()


def _shares(trace: Mapping[str, TracedStep]) -> Counter[float]:
    """Finish times over the latest one; those of nodes that take no time, such as a start, are left out."""
    times = [step.finish for step in trace.values()]
    return Counter(round(time / (max(times) or 1), 9) for time in times if time)
