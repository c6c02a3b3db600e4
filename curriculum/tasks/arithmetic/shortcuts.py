"""Shortcuts of arithmetic questions: answers without the order of the operations.

Each uses the numbers alone, one operation, one branch, or one pass over the list or the written expression.
"""

import math
from collections.abc import Callable, Mapping, Sequence

from isomorph.curriculum.tasks.arithmetic.expression import APPLY, SIGNS, ExpressionTree, reference


def sum_of_all(tree: ExpressionTree) -> int | None:
    return sum(tree.numbers)


def product_of_all(tree: ExpressionTree) -> int | None:
    return math.prod(tree.numbers)


def largest_number(tree: ExpressionTree) -> int | None:
    return max(tree.numbers)


def last_number(tree: ExpressionTree) -> int | None:
    """The number that is listed last."""
    return tree.numbers[-1]


def last_operation(tree: ExpressionTree) -> int | None:
    """The operation that is asked for, between the two numbers next to its sign in the written expression."""
    sign, left, right = tree.nodes[tree.root]
    return APPLY[sign](_end(tree, left, 2), _end(tree, right, 1))


def last_listed(tree: ExpressionTree) -> int | None:
    """The operation that is listed last, between the two numbers next to its sign."""
    sign, left, right = tree.nodes[-1]
    return APPLY[sign](_end(tree, left, 2), _end(tree, right, 1))


def along_first(tree: ExpressionTree) -> int | None:
    """Only first operands are worked out; of a second one its first number counts."""
    return _along(tree, tree.root, worked=1)


def along_second(tree: ExpressionTree) -> int | None:
    """Only second operands are worked out; of a first one its first number counts."""
    return _along(tree, tree.root, worked=2)


def left_to_right(tree: ExpressionTree) -> int | None:
    """The written expression from left to right, without parentheses and precedence."""
    return _left_to_right(tree.infix)


def by_precedence(tree: ExpressionTree) -> int | None:
    """The written expression without parentheses, products first."""
    numbers: list[int | str] = tree.infix[:1]
    for sign, number in zip(tree.infix[1::2], tree.infix[2::2], strict=True):
        if sign == "*":
            numbers[-1] = int(numbers[-1]) * int(number)
        else:
            numbers += [sign, number]
    return _left_to_right(numbers)


def in_order_of_listing(tree: ExpressionTree) -> int | None:
    """Values in one pass over the list: an operation that is not known yet counts 0."""
    known: dict[int, int] = {}
    for j, (sign, left, right) in enumerate(tree.nodes):
        known[j] = APPLY[sign](*(operand if operand >= 0 else known.get(-1 - operand, 0) for operand in (left, right)))
    return known[tree.root]


def running_total(tree: ExpressionTree) -> int | None:
    """One total through the list: a number joins it by the sign of its operation; two numbers are added to it."""
    total: int | None = None
    for sign, left, right in tree.nodes:
        if left >= 0 and right >= 0:
            total = APPLY[sign](left, right) + (total or 0)
        elif right >= 0:
            total = right if total is None else APPLY[sign](total, right)
        elif left >= 0:
            total = left if total is None else APPLY[sign](left, total)
    return total


def _end(tree: ExpressionTree, operand: int, side: int) -> int:
    """The first number (side 1) or the last one (side 2) of an operand as it is written."""
    while (j := reference(operand)) is not None:
        operand = tree.nodes[j][1] if side == 1 else tree.nodes[j][2]
    return operand


def _along(tree: ExpressionTree, j: int, *, worked: int) -> int:
    sign, *operands = tree.nodes[j]
    own = [
        _along(tree, ref, worked=worked)
        if place == worked and (ref := reference(operand)) is not None
        else _end(tree, operand, 1)
        for place, operand in enumerate(operands, 1)
    ]
    return APPLY[sign](*own)


def _left_to_right(parts: Sequence[int | str]) -> int:
    total = int(parts[0])
    for sign, number in zip(parts[1::2], parts[2::2], strict=True):
        total = APPLY[str(sign)](total, int(number))
    return total


SHORTCUTS: Mapping[str, Callable[[ExpressionTree], int | None]] = {
    function.__name__: function
    for function in (
        along_first,
        along_second,
        left_to_right,
        by_precedence,
        in_order_of_listing,
        running_total,
        last_operation,
        last_listed,
        sum_of_all,
        product_of_all,
        largest_number,
        last_number,
    )
}


def features(tree: ExpressionTree) -> tuple[int, Sequence[float]]:
    """Number of numbers; 1, the numbers from the largest to the smallest, and how often each sign occurs."""
    signs = [sign for sign, _, _ in tree.nodes]
    return len(tree.numbers), [1.0, *sorted(tree.numbers, reverse=True), *(signs.count(sign) for sign in SIGNS[1:])]
