"""Tokens of a mathematical answer in LaTeX, plain text or SymPy's notation."""

import re
from dataclasses import dataclass

_UNICODE = {
    **{"−": "-", "–": "-", "×": "*", "·": "*", "÷": "/", "∞": r"\infty ", "π": r"\pi ", "∪": r"\cup ", "√": r"\sqrt "},
    **{"≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "°": r"^\circ ", "²": "^{2}", "³": "^{3}", "±": r"\pm "},
}
_GROUPING = "‚"  # between the thousands of a number, where it cannot be a comma of a list
_CLEANED = (
    (re.compile(r",\s?\\!|\{,\}"), _GROUPING),
    (re.compile(r"\\!|\\(?:left|right|displaystyle|textstyle|bigl?|bigr)(?![a-zA-Z])"), ""),
    (re.compile(r"(?<!\\)\\[,;: ~()\[\]]|(?<!\\)\$|(?<=\S)~|\s"), " "),
    (re.compile(r"\\[dtc]frac(?![a-zA-Z])"), r"\\frac"),
    (re.compile(r"\\(?:cdot|times)(?![a-zA-Z])"), "*"),
    (re.compile(r"\\div(?![a-zA-Z])"), "/"),
)
_TOKEN = re.compile(
    rf"(?P<number>\d{{1,3}}(?:{_GROUPING}\d{{3}})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?(?:[eE][-+]?\d{{1,3}}(?![\d.a-zA-Z]))?|\.\d+)"
    r"|(?P<text>\\(?:text|textrm|mathrm|textit|mbox)\s?\{(?P<words>[^{}\\]{0,60})\})"
    r"|(?P<name>\\[a-zA-Z]+|Point[23]D|[a-zA-Z]+)"
    r"|(?P<sign>\*\*|<=|>=|!=|==|\\[{}$%\\|]|[-+*/^_=<>(){}\[\],;:!.%|&'])|(?P<space> +)|(?P<other>.)",
    re.ASCII | re.DOTALL,
)
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])", re.ASCII)


class NotRead(ValueError):
    """The text is no mathematical object of the grammar in ``notation.py``."""


@dataclass(frozen=True, slots=True)
class Token:
    kind: str  # number | text | name | sign | other
    text: str


def tokens_of(text: str) -> tuple[Token, ...]:
    """The tokens of ``text``, without spaces and marks that have no meaning."""
    for character, latex in _UNICODE.items():
        text = text.replace(character, latex)
    for pattern, replacement in _CLEANED:
        text = pattern.sub(replacement, text)
    text = _THOUSANDS.sub(_grouped, text)
    found = []
    for match in _TOKEN.finditer(text.strip()):
        kind = match.lastgroup or ""
        if kind == "words" or match["text"]:
            found.append(Token("text", " ".join(match["words"].split())))
        elif kind != "space":
            found.append(Token(kind, match.group().replace(_GROUPING, "")))
    return tuple(found)


def _grouped(match: re.Match[str]) -> str:
    """The number 1,657 with its comma marked; unchanged within brackets, where (20,100) is a pair."""
    before = match.string[: match.start()]
    depth = sum(map(before.count, "([{")) - sum(map(before.count, ")]}"))
    return match.group() if depth else match.group().replace(",", _GROUPING)


class Cursor:
    """A position in a sequence of tokens."""

    def __init__(self, tokens: tuple[Token, ...]) -> None:
        self.tokens, self.position = tokens, 0

    def left(self) -> tuple[Token, ...]:
        return self.tokens[self.position :]

    def peek(self, ahead: int = 0) -> str:
        """The next token's text; "" at the end, and for words in ``\\text{..}``."""
        token = self.token(ahead)
        return token.text if token is not None and token.kind != "text" else ""

    def token(self, ahead: int = 0) -> Token | None:
        index = self.position + ahead
        return self.tokens[index] if 0 <= index < len(self.tokens) else None

    def kind(self, ahead: int = 0) -> str:
        token = self.token(ahead)
        return token.kind if token is not None else ""

    def take(self) -> Token:
        token = self.token()
        if token is None:
            raise NotRead("ends too early")
        self.position += 1
        return token

    def accept(self, *texts: str) -> bool:
        if self.peek() in texts and self.peek():
            self.position += 1
            return True
        return False

    def expect(self, text: str) -> None:
        if not self.accept(text):
            raise NotRead(f"must have {text!r}, got {self.peek()!r}")
