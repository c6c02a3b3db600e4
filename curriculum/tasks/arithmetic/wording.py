"""Names, things and sentence frames of arithmetic questions, terse and full.

A frame tells one operation: {x} is who has its result, {a} and {b} its operands, each a number ("n") or somebody whose
own operation it refers to ("who"). The last two frames of each kind are used in the test exam only; those of the terse
form have no word of their own.
"""

from collections.abc import Mapping

from isomorph.curriculum.tasks import frames

MAX_OPERATIONS = 10


def _list(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split("|"))


TERSE_NAMES = _list("Ann|Bob|Cem|Dan|Eva|Fay|Gus|Hal|Ida|Jon|Kim|Leo")
TERSE_THINGS = _list("apples|pens|cards|shells")
NAMES = frames.NAMES
THINGS = _list(
    "apples|marbles|stamps|postcards|shells|buttons|pencils|coins|plums|walnuts|tickets|balloons|biscuits|candles|"
    "photographs|records|magnets|stickers|feathers|ribbons|tulips|onions|bricks|badges|comics|kites|spoons|lanterns|"
    "acorns|puzzles|mugs|scarves|seeds|keys|flags|books"
)

TERSE_INTROS = _list(
    "Some people have {things}.|This is about {things}.|People count the {things} they have.|Here is who has {things}.|"
    "Some people count {things}.|This is about people who have {things}."
)
INTROS = _list(
    "A few friends collect {things} and compare what they have.|At a fair, several people come home with "
    "{things}.|Here is what is known about some {things}.|The children of one street have counted their "
    "{things}.|After the market everybody looks at the {things} in the bag.|A club keeps a book about the {things} of "
    "its members.|Some cousins talk about {things}.|In a story people own, buy and give away {things}.|A teacher asks "
    "her pupils about their {things}.|During the holidays a group of people has gathered {things}.|This is a riddle "
    "about {things}.|Several neighbours share and trade {things}."
)

# sign and kinds of operands -> frames
TERSE_FACTS: Mapping[tuple[str, str], tuple[str, ...]] = {
    ("+", "n n"): _list(
        "{x} has {a} {things} and buys {b}.|{x} had {a} {things} and is given {b}.|{x} has {a} and {b} {things}.|{x} "
        "had {a} {things} and buys {b}.|{x} has {a} {things} and is given {b}."
    ),
    ("+", "who n"): _list(
        "{x} has {b} {things} more than {a}.|{x} had as many {things} as {a} and buys {b}.|{x} has the {things} of {a} "
        "and {b} more.|{x} had as many {things} as {a} and is given {b}.|{x} has as many {things} as {a} and {b} more."
    ),
    ("+", "n who"): _list(
        "{x} had {a} {things} and is given as many as {b} has.|{x} has {a} {things} and buys as many as {b} has.|{x} "
        "has {a} {things} and the {things} of {b}.|{x} had {a} {things} and buys as many as {b} has.|{x} has {a} "
        "{things} and as many as {b} has."
    ),
    ("+", "who who"): _list(
        "{x} has as many {things} as {a} and {b} have.|{x} has the {things} of {a} and the {things} of {b}.|{x} had "
        "as many {things} as {a} and is given as many as {b} has.|{x} had as many {things} as {a} and buys as many as "
        "{b} has.|{x} has the {things} of {a} and of {b}."
    ),
    ("-", "n n"): _list(
        "{x} had {a} {things} and gave away {b}.|{x} had {a} {things} and lost {b}.|Of {a} {things} {x} gave away "
        "{b}.|Of {a} {things} {x} lost {b}.|{x} had {a} {things}, but lost {b}."
    ),
    ("-", "who n"): _list(
        "{x} has {b} {things} less than {a}.|{x} had as many {things} as {a}, but gave away {b}.|{x} had as many "
        "{things} as {a} and lost {b}.|{x} had as many {things} as {a}, but lost {b}.|{x} had the {things} of {a} and "
        "gave away {b}."
    ),
    ("-", "n who"): _list(
        "{x} had {a} {things} and gave away as many as {b} has.|{x} had {a} {things}, but lost as many as {b} has.|Of "
        "{a} {things} {x} gave away as many as {b} has.|{x} had {a} {things} and lost as many as {b} has.|Of {a} "
        "{things} {x} lost as many as {b} has."
    ),
    ("-", "who who"): _list(
        "{x} had as many {things} as {a} and gave away as many as {b} has.|{x} had the {things} of {a}, but lost as "
        "many as {b} has.|{x} had as many {things} as {a}, but gave away as many as {b} has.|{x} had the {things} of "
        "{a} and gave away as many as {b} has.|{x} had as many {things} as {a} and lost as many as {b} has."
    ),
    ("*", "n n"): _list(
        "{x} has {a} bags of {b} {things}.|{x} buys {a} bags with {b} {things} each.|{x} is given {a} times {b} "
        "{things}.|{x} has {a} bags with {b} {things} each.|{x} has {a} times {b} {things}."
    ),
    ("*", "who n"): _list(
        "{x} has the {things} of {a}, {b} times.|{x} buys as many {things} as {a} has, {b} times.|{x} is given as many "
        "{things} as {a} has, {b} times.|{x} buys the {things} of {a}, {b} times.|{x} has as many {things} as {a}, {b} "
        "times."
    ),
    ("*", "n who"): _list(
        "{x} has {a} times as many {things} as {b}.|{x} buys {a} times as many {things} as {b} has.|{x} has {a} bags "
        "with as many {things} as {b} has.|{x} has {a} times the {things} of {b}.|{x} is given {a} times as many "
        "{things} as {b} has."
    ),
}
_MORE_FACTS: Mapping[tuple[str, str], tuple[str, ...]] = {
    ("+", "n n"): _list(
        "{x} found {a} {things} on Monday and {b} on Tuesday.|In the left hand {x} holds {a} {things}, in the right "
        "hand {b}."
    ),
    ("+", "who n"): _list(
        "Whatever number of {things} {a} owns, {x} owns {b} in addition.|{x} made a pile as high as that of {a} and "
        "put {b} {things} on top."
    ),
    ("+", "n who"): _list(
        "To the {a} {things} on the table {x} adds the number that {b} has.|{x} starts with {a} {things}; then a copy "
        "of the whole collection of {b} arrives."
    ),
    ("+", "who who"): _list(
        "If {a} and {b} put their {things} together, it would be what {x} has.|{x} owns the sum of what {a} and {b} "
        "own in {things}."
    ),
    ("-", "n n"): _list(
        "Out of a box with {a} {things} {x} ate, sold or dropped {b} and keeps the rest.|{x} paid with {b} of {a} "
        "{things} and kept the others."
    ),
    ("-", "who n"): _list(
        "{a} is ahead of {x} by {b} {things}.|To have what {a} has, {x} would need {b} {things} more."
    ),
    ("-", "n who"): _list(
        "{x} and {b} share {a} {things}, and what {b} does not have belongs to {x}.|From {a} {things} the number that "
        "{b} has is taken; {x} keeps the rest."
    ),
    ("-", "who who"): _list(
        "{x} has as many {things} as {a} has more than {b}.|The number by which {a} is ahead of {b} in {things} is "
        "what {x} has."
    ),
    ("*", "n n"): _list(
        "{x} filled {a} rows with {b} {things} in each.|On each of {a} days {x} received {b} {things}."
    ),
    ("*", "who n"): _list(
        "Take what {a} has and multiply by {b}: so many {things} has {x}.|The {things} of {a} would have to be counted "
        "{b} times to get to those of {x}."
    ),
    ("*", "n who"): _list(
        "{x} owns {a} boxes, and each holds as many {things} as {b} has.|On each of {a} days {x} received the number "
        "of {things} that {b} has."
    ),
}
FACTS: Mapping[tuple[str, str], tuple[str, ...]] = {kind: _MORE_FACTS[kind] + own for kind, own in TERSE_FACTS.items()}

TERSE_QUESTIONS = _list(
    "How many {things} does {x} have?|How many {things} has {x}?|Count the {things} of {x}.|Give the {things} that {x} "
    "has.|Count the {things} that {x} has.|Give how many {things} {x} has."
)
QUESTIONS = _list(
    "How many {things} does {x} have?|What is the number of {things} that {x} has?|Work out how many {things} belong "
    "to {x}.|With how many {things} does {x} end up?|Tell the number of {things} in the hands of {x}.|If all of this "
    "is true, how many {things} does {x} own?|So how many {things} are there with {x}?|Find out how many {things} {x} "
    "has.|{x} counts the {things}. What is the result?|How large is the collection of {things} of {x}?|How many "
    "{things} can {x} show?|What number of {things} is owned by {x}?"
)

GRAPH_INTRO = (
    "Here is a graph of calculations. Each node has an operation and two operands, which are numbers or other nodes:"
)
EDGES_INTRO = (
    "Here is a graph of calculations. An edge leads from an operand, a number or a node, to the node that uses it; of "
    "the two edges to a node the first one brings the first operand:"
)
GRAPH_SIGNS = "The operations of the nodes:"
GRAPH_QUESTION = "What is the value of {x}?"
EXPRESSION_INTRO = "Work out the value of this expression:"
TABLE_INTRO = "Each row of the table applies an operation to two operands, which are numbers or other rows:"
INSTRUCTION_EXAMPLE = "1"
