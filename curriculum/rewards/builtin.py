"""The reward functions that a recipe names without a file: ``BUILTINS`` lists them.

The stated answer of a response is what stands in its last ``<answer>...</answer>``, else in its last
``\\boxed{...}``, else after its last ``####``.
"""

import importlib.util
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from fractions import Fraction

from isomorph.curriculum.rewards.answer import Answer, answer_text, last_answer, stated_answer
from isomorph.curriculum.rewards.families import FAMILIES, function

MAX_ANSWER_CHARS = 2_000  # longer ones are wrong, where a library reads them
# commas between thousands, also as 12,34,567; other commas divide a list
_WHOLE = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d{1,2}(?:,\d{2})+,\d{3}(?!\d)|\d+)"
_NUMBER = re.compile(
    rf"(?:(?<![\w)])[-+])?(?:{_WHOLE}(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{{1,3}})?(?:\s{{0,2}}/\s{{0,2}}{_WHOLE})?", re.ASCII
)
_AS_PLAIN = (("\N{MINUS SIGN}", "-"), ("{,}", ","))
_MARK = "####"  # before the final answer of a row of GSM8K
# "the answer is a mystery" chooses nothing
_CHOICE_PHRASE = r"answer(?:\s+is)?\s*:?\s*\**\s*[(\[]?([{letters}])\b(?!(?-i:(?<=a))\s+[a-z])"


@dataclass(frozen=True, slots=True, kw_only=True)
class Builtin:
    """One of our reward functions."""

    function: str  # its name in this file
    in_worker: bool = False  # its time has no bound: it runs in a process that is killed at a deadline
    packages: tuple[str, ...] = ()
    extra: str = ""  # the optional dependency that installs ``packages``

    @property
    def line(self) -> str:
        """What it rewards, in a line: the first of its docstring."""
        return (globals()[self.function].__doc__ or "").partition("\n")[0].replace("``", "")

    @property
    def missing_packages(self) -> list[str]:
        return [name for name in self.packages if importlib.util.find_spec(name) is None]


def exact(answer: Answer, ignore_case: bool = False) -> float:
    """1.0 where the stated answer, or without one the whole response, is the gold's, but for spaces around it."""
    stated, gold = _stated_or_all(answer.text), _stated_or_all(answer.gold)
    return float(stated.casefold() == gold.casefold() if ignore_case else stated == gold)


def numeric(answer: Answer, tolerance: float = 0.0, strict: bool = False) -> float | None:
    """1.0 where the last number of the stated answer is that of the gold, within ``tolerance`` * max(1, |gold|).

    A response without a stated answer is read as a whole, with ``strict`` not at all. Does not apply where the gold has
    no number.
    """
    gold = _last_number(_stated_or_all(answer.gold))
    if gold is None:
        return None
    stated = _stated(answer.text)
    found = _last_number(answer.text if stated is None and not strict else stated or "")
    if found is None or found == gold or not tolerance:
        return float(found == gold)
    return float(abs(found - gold) <= Fraction(tolerance) * max(Fraction(1), abs(gold)))


def choice(answer: Answer, letters: str = "ABCDE") -> float | None:
    """1.0 where the chosen letter is the gold's. Does not apply where the gold has none.

    The stated answer, else what follows the last "answer is", else a last line that holds nothing but the letter.
    """
    gold = _letter(_stated_or_all(answer.gold), letters)
    if gold is None:
        return None
    stated = _stated(answer.text)
    if stated is not None:
        return float(_letter(stated, letters) == gold)
    phrases = re.findall(_CHOICE_PHRASE.replace("{letters}", re.escape(letters)), answer.text, re.IGNORECASE)
    last = phrases[-1].upper() if phrases else _alone(answer.text.rstrip().rpartition("\n")[2], letters)
    return float(last == gold)


def formatted(answer: Answer, pattern: str | None = None) -> float:
    """1.0 where the regular expression ``pattern`` matches the whole response (``.`` matches line ends, too).

    Without ``pattern``: where the response states an answer.
    """
    if pattern is None:
        return float(bool(_stated(answer.text)))
    return float(re.fullmatch(pattern, answer.text, re.DOTALL) is not None)


def math_verify(answer: Answer) -> float | None:
    """1.0 where Math-Verify finds the response equal to the gold. Does not apply to a gold that it cannot read."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    gold_text = _stated_or_all(answer.gold) if _MARK in answer.gold else answer.gold
    if not re.search(r"\\boxed|\$|\\\(|\\\[", gold_text):
        gold_text = f"${gold_text}$"
    gold = parse(gold_text, parsing_timeout=None)
    if not gold:
        return None
    configs = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
    stated = last_answer(answer.text)
    text = answer.text if stated is None else f"${stated.strip('$')}$"
    found = parse(text, extraction_config=configs, parsing_timeout=None)
    return float(verify(gold, found, timeout_seconds=None))


def async_plan(answer: Answer) -> float:
    """1.0 where the stated duration is the gold's."""
    return _by_family("async_plan", answer)


def math_sympy(answer: Answer) -> float:
    """1.0 where the stated expression is proven equal to the gold; decided exactly, with SymPy."""
    return _by_family("math", answer)


def physics(answer: Answer) -> float:
    """1.0 where value and unit of the stated quantity are the gold's."""
    return _by_family("physics", answer)


def cosine(
    answer: Answer,
    *,
    max_tok: int,
    of: str = "numeric",
    wrong: Sequence[float] = (-1.0, -0.5),
    right: Sequence[float] = (1.0, 0.5),
) -> float | None:
    """Correctness scaled by length along a cosine (arXiv 2502.03373, appendix C.1).

    ``of``: the one of our functions that decides what is right. ``wrong`` and ``right``: rewards of a response without
    tokens and of one with ``max_tok`` or more. Does not apply where ``of`` does not.
    """
    deciding: dict[str, Callable[[Answer], float | None]] = {
        "exact": exact,
        "numeric": numeric,
        "choice": choice,
        "async_plan": async_plan,
    }
    if of not in deciding:
        raise ValueError(f"of must be one of {', '.join(deciding)}, got {of!r}")
    reward = deciding[of](answer)
    if reward is None:
        return None
    short, long = right if reward >= 1 else wrong
    return long + 0.5 * (short - long) * (1 + math.cos(math.pi * min(answer.num_tok / max_tok, 1.0)))


def repetition(completion_ids: list[list[int]], ngram: int = 3, penalty: float = 1.0) -> list[float]:
    """-``penalty`` times the share of repeated n-grams of tokens (arXiv 2502.03373, appendix C.2)."""
    return [-penalty * _repeated(ids, ngram) for ids in completion_ids]


BUILTINS: Mapping[str, Builtin] = {
    "exact": Builtin(function="exact"),
    "numeric": Builtin(function="numeric"),
    "choice": Builtin(function="choice"),
    "formatted": Builtin(function="formatted", in_worker=True),
    "math": Builtin(
        function="math_verify",
        in_worker=True,
        packages=("math_verify",),
        extra="math",
    ),
    "math_sympy": Builtin(
        function="math_sympy",
        in_worker=True,
        packages=FAMILIES["math"].packages,
        extra="math",
    ),
    "physics": Builtin(function="physics", in_worker=True, packages=FAMILIES["physics"].packages, extra="math"),
    "async_plan": Builtin(function="async_plan"),
    "cosine": Builtin(function="cosine"),
    "repetition": Builtin(function="repetition"),
}


def _by_family(name: str, answer: Answer) -> float:
    family = FAMILIES[name]
    stated = stated_answer(answer.text, reads_boxed=family.reads_boxed)
    if stated is None or len(stated) > MAX_ANSWER_CHARS:
        return 0.0
    return float(function(family.function)(stated, answer_text(answer.gold)))


def _stated(text: str) -> str | None:
    stated = stated_answer(text, reads_boxed=True)
    if stated is None and _MARK in text:
        stated = text.rpartition(_MARK)[2].strip()
    return stated


def _stated_or_all(text: str) -> str:
    stated = _stated(text)
    return text.strip() if stated is None else stated


def _last_number(text: str) -> Fraction | None:
    """Exactly, with commas between thousands; a fraction such as 3/4 is one number."""
    text = text[-MAX_ANSWER_CHARS:]
    for written, plain in _AS_PLAIN:
        text = text.replace(written, plain)
    found = _NUMBER.findall(text)
    if not found:
        return None
    value, _, divisor = found[-1].replace(",", "").partition("/")
    try:
        number = Fraction(Decimal(value.strip()))
        return number / Fraction(divisor.strip()) if divisor else number
    except (InvalidOperation, ValueError, ZeroDivisionError):
        return None


def _letter(text: str, letters: str) -> str | None:
    """The first letter that stands alone, as in "B", "(B)" or "B. because"."""
    found = re.search(rf"(?<![A-Za-z])[{re.escape(letters)}](?![A-Za-z])", text)
    return found.group() if found else _alone(text, letters)


def _alone(line: str, letters: str) -> str | None:
    bare = line.strip().strip("()[]*. \t").upper()
    return bare if len(bare) == 1 and bare in letters else None


def _repeated(ids: Sequence[int], ngram: int) -> float:
    grams = [tuple(ids[i : i + ngram]) for i in range(len(ids) - ngram + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
