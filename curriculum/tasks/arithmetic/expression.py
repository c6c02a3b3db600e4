"""Expressions with named parts: the instance that an arithmetic question is rendered from.

An expression is a tree of operations. Operation j is ``nodes[j]``: a sign and two operands, each a number >= 0 or a
reference to another operation, kept as -1 - j. The nodes stand in the order in which they are listed.
"""

import hashlib
import random
from dataclasses import dataclass
from functools import cached_property
from operator import add, mul, sub
from typing import ClassVar, Literal, Self, get_args

from pydantic import Field, model_validator

from isomorph.curriculum.tasks.arithmetic.wording import MAX_OPERATIONS, NAMES, TERSE_NAMES, TERSE_THINGS, THINGS
from isomorph.curriculum.tasks.sieve import SievedDifficulty

Sign = Literal["+", "-", "*"]
SIGNS: tuple[Sign, ...] = get_args(Sign)
APPLY = {"+": add, "-": sub, "*": mul}
Node = tuple[Sign, int, int]


class ArithmeticDifficulty(SievedDifficulty):
    """Size and wording of generated expressions. The defaults are the smallest useful setting."""

    ranges: ClassVar[tuple[str, ...]] = ("operations", "number")

    min_operations: int = Field(2, ge=1, le=MAX_OPERATIONS)
    max_operations: int = Field(3, ge=1, le=MAX_OPERATIONS)
    signs: tuple[Sign, ...] = SIGNS  # one is drawn for each operation; * always has a number of the text
    min_number: int = Field(2, ge=0, le=10_000)  # below 2 a story says "1 apples"
    max_number: int = Field(9, ge=1, le=10_000)
    max_value: int = Field(99, ge=1, le=100_000)  # of every operation; none is below 0
    shuffled: bool = False  # list the operations at random instead of in an order in which they can be done

    @model_validator(mode="after")
    def _signs(self) -> Self:
        if not self.signs or len(set(self.signs)) != len(self.signs):
            raise ValueError(f"signs must name one or more different ones of {SIGNS}, got {self.signs}")
        return self


def reference(operand: int) -> int | None:
    """The number of the operation that an operand refers to; None for a number."""
    return -1 - operand if operand < 0 else None


@dataclass(frozen=True)
class ExpressionTree:
    """An expression as its shortcuts see it."""

    nodes: tuple[Node, ...]
    root: int

    @cached_property
    def order(self) -> list[int]:
        """The operations, each after its operands, the first operand first."""
        found: list[int] = []

        def visit(j: int) -> None:
            for operand in self.nodes[j][1:]:
                if operand < 0:
                    visit(-1 - operand)
            found.append(j)

        visit(self.root)
        return found

    @cached_property
    def values(self) -> list[int]:
        """Of each operation."""
        found = [0] * len(self.nodes)
        for j in self.order:
            sign, left, right = self.nodes[j]
            found[j] = APPLY[sign](self.value(left, found), self.value(right, found))
        return found

    @staticmethod
    def value(operand: int, values: list[int]) -> int:
        """Of an operand, given the values of the operations."""
        return values[-1 - operand] if operand < 0 else operand

    @property
    def total(self) -> int:
        """The value of the expression: the right answer."""
        return self.values[self.root]

    @cached_property
    def numbers(self) -> list[int]:
        """As they are listed."""
        return [operand for _, *own in self.nodes for operand in own if operand >= 0]

    @cached_property
    def infix(self) -> list[int | str]:
        """Numbers and signs as in the written expression, without parentheses."""
        return self._infix(-1 - self.root)

    def _infix(self, operand: int) -> list[int | str]:
        if operand >= 0:
            return [operand]
        sign, left, right = self.nodes[-1 - operand]
        return [*self._infix(left), sign, *self._infix(right)]

    @property
    def depth(self) -> int:
        """Operations that wait for each other."""
        found = [0] * len(self.nodes)
        for j in self.order:
            found[j] = 1 + max(self.value(operand, found) if operand < 0 else 0 for operand in self.nodes[j][1:])
        return found[self.root]

    def shape(self, operand: int | None = None, *, has_numbers: bool) -> str:
        """The same for trees that differ only in the order of operands of + and *, and of the list."""
        if operand is not None and operand >= 0:
            return str(operand) if has_numbers else "n"
        sign, left, right = self.nodes[self.root if operand is None else -1 - operand]
        parts = [self.shape(left, has_numbers=has_numbers), self.shape(right, has_numbers=has_numbers)]
        return f"({sign} {' '.join(parts if sign == '-' else sorted(parts))})"


@dataclass(frozen=True, kw_only=True)
class Expression:
    """A tree, what its operations are called, and what is counted."""

    tree: ExpressionTree
    names: tuple[str, ...]
    things: str
    is_terse: bool

    @cached_property
    def key(self) -> str:
        """The same for expressions that differ only in names and the order of their list and of operands of + and *."""
        return _digest(self.tree.shape(has_numbers=True))


def structure_of(tree: ExpressionTree) -> str:
    """The same for expressions that differ in their numbers, too."""
    return _digest(tree.shape(has_numbers=False))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def random_shape(rng: random.Random, difficulty: ArithmeticDifficulty) -> ExpressionTree:
    """A tree whose numbers are all 1."""
    nodes: list[Node] = []
    num = rng.randint(difficulty.min_operations, difficulty.max_operations)
    root = _grown(rng, difficulty, num, nodes)
    return ExpressionTree(tuple(nodes), -1 - root)


def with_numbers(rng: random.Random, shape: ExpressionTree, difficulty: ArithmeticDifficulty) -> ExpressionTree | None:
    """The tree with random numbers; None where a value is out of range."""
    low, span = difficulty.min_number, difficulty.max_number - difficulty.min_number + 1
    drawn = rng.random
    nodes = tuple(
        (sign, a if a < 0 else low + int(span * drawn()), b if b < 0 else low + int(span * drawn()))
        for sign, a, b in shape.nodes
    )
    tree = ExpressionTree(nodes, shape.root)
    if not all(0 <= value <= difficulty.max_value for value in tree.values):
        return None
    return _relisted(tree, rng.sample(range(len(nodes)), len(nodes))) if difficulty.shuffled else tree


def _relisted(tree: ExpressionTree, new: list[int]) -> ExpressionTree:
    """Operation j is listed as number ``new[j]``."""
    moved = list(tree.nodes)
    for j, (sign, a, b) in enumerate(tree.nodes):
        moved[new[j]] = sign, -1 - new[-1 - a] if a < 0 else a, -1 - new[-1 - b] if b < 0 else b
    return ExpressionTree(tuple(moved), new[tree.root])


def _grown(rng: random.Random, difficulty: ArithmeticDifficulty, num: int, nodes: list[Node]) -> int:
    """An operand with ``num`` operations, which are added to ``nodes``, operands first."""
    if num == 0:
        return 1
    sign = rng.choice(difficulty.signs)
    left = rng.choice((0, num - 1)) if sign == "*" else rng.randrange(num)
    node = sign, _grown(rng, difficulty, left, nodes), _grown(rng, difficulty, num - 1 - left, nodes)
    nodes.append(node)
    return -len(nodes)


def named(rng: random.Random, tree: ExpressionTree, difficulty: ArithmeticDifficulty) -> Expression:
    """The expression with random names and things."""
    is_terse = difficulty.form == "terse"
    return Expression(
        tree=tree,
        names=tuple(rng.sample(TERSE_NAMES if is_terse else NAMES, len(tree.nodes))),
        things=rng.choice(TERSE_THINGS if is_terse else THINGS),
        is_terse=is_terse,
    )
