"""Units behind a number in a mathematical answer, as words: ``5 cm``, ``30^\\circ``, ``20\\%``."""

import re

from isomorph.curriculum.rewards.tokens import Cursor, NotRead

JOINTS = {"and", "or"}  # words between two answers
_DEGREES = {"degree", "degrees", "deg"}
# words that change the number before them, or leave a choice
_OTHER_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve twenty thirty forty fifty sixty seventy "
    "eighty ninety hundred hundreds thousand thousands million millions billion billions trillion dozen dozens pair "
    "pairs half halves third thirds quarter quarters over squared cubed factorial plus minus times divided by not "
    "to than mod modulo base at least most more less about around approximately or and if except but sqrt pi root"
)
_NO_UNITS = frozenset(_OTHER_WORDS.split())


def read_unit(cursor: Cursor) -> list[str]:
    """The words of the unit that follows a number, without plural endings; [] where none follows.

    Raises:
        NotRead: words follow that are no unit.
    """
    if cursor.peek() == "^" and cursor.peek(1) in (r"\circ", "{"):
        start = cursor.position
        cursor.position += 1
        braces = cursor.accept("{")
        if cursor.accept(r"\circ") and (not braces or cursor.accept("}")):
            return ["degree"]
        cursor.position = start
    if cursor.accept("%", r"\%"):
        return ["percent"]
    found: list[str] = []
    while (token := cursor.token()) is not None and token.kind in ("name", "text"):
        words = token.text.lower().split()
        if token.kind == "name" and (token.text.startswith("\\") or words[0] in JOINTS):
            break
        if token.kind == "text" and found == [] and words and words[0] in JOINTS:
            break
        if any(word in _NO_UNITS or word.endswith("th") or word.endswith("ths") for word in words):
            raise NotRead(f"{token.text!r} is no unit")
        cursor.position += 1
        found += words
        if cursor.peek() == "^" and cursor.kind(1) == "number":
            found.append("^" + cursor.tokens[cursor.position + 1].text)
            cursor.position += 2
    if len(found) > 6 or any(not re.fullmatch(r"[a-z.]+|\^\d|[a-z]+/[a-z]+", word) for word in found):
        raise NotRead("no unit")
    names = [word.rstrip(".") for word in found]
    if len(names) == 1 and names[0] in _DEGREES:
        return ["degree"]
    return [name[:-1] if len(name) > 3 and name.endswith("s") else name for name in names]
