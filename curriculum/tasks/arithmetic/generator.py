"""Generated arithmetic tasks: the value of an expression, as a story, a graph, a program or a formula."""

import random
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from isomorph.curriculum.rewards.duration import number_of
from isomorph.curriculum.rewards.families import ARITHMETIC as FAMILY
from isomorph.curriculum.tasks.arithmetic import wording
from isomorph.curriculum.tasks.arithmetic.expression import (
    ArithmeticDifficulty,
    Expression,
    ExpressionTree,
    named,
    random_shape,
    structure_of,
    with_numbers,
)
from isomorph.curriculum.tasks.arithmetic.render import TABLE_SYNTAX, TERSE_SYNTAX, TRACE_SYNTAX, render, worked
from isomorph.curriculum.tasks.arithmetic.shortcuts import SHORTCUTS, features
from isomorph.curriculum.tasks.generator import Written, words_of
from isomorph.curriculum.tasks.sieve import SievedGenerator
from isomorph.curriculum.tasks.task import DataError


class Arithmetic(SievedGenerator[ArithmeticDifficulty, Expression, ExpressionTree]):
    """The value of a tree of sums, differences and products: exact integers, none below 0."""

    family = FAMILY
    trained = ("natural", "graph", "code", "expression")
    held_out = ("table",)
    difficulty = ArithmeticDifficulty
    wrong = "wrong value"
    shortcuts = SHORTCUTS
    salt = 539  # chosen among 3,000 so that both exams get an even share of the structures of 3 to 5 operations

    def shape(self, rng: random.Random, difficulty: ArithmeticDifficulty) -> ExpressionTree | None:
        return random_shape(rng, difficulty)

    def structure_of(self, shape: ExpressionTree) -> str:
        return structure_of(shape)

    def filled(
        self, rng: random.Random, shape: ExpressionTree, difficulty: ArithmeticDifficulty
    ) -> ExpressionTree | None:
        return with_numbers(rng, shape, difficulty)

    def named(self, rng: random.Random, view: ExpressionTree, difficulty: ArithmeticDifficulty) -> Expression:
        return named(rng, view, difficulty)

    def features(self, view: ExpressionTree) -> tuple[int, Sequence[float]]:
        return features(view)

    def write(
        self,
        rng: random.Random,
        instance: Expression,
        difficulty: ArithmeticDifficulty,
        representation: str,
        *,
        is_kept: bool = False,
    ) -> Written:
        self.check_representation(representation)
        question, has_names = render(instance, representation, rng, difficulty, is_kept=is_kept)
        return Written(question, lambda is_sequential: worked(instance, has_names=has_names, sequential=is_sequential))

    def answer(self, instance: Expression) -> str:
        return str(instance.tree.total)

    def sequential_answer(self, instance: Expression) -> str:
        """The sum of all numbers."""
        return str(sum(instance.tree.numbers))

    def facts(self, instance: Expression) -> dict[str, Any]:
        """Operations as listed: sign and two operands, a number or -1 - the number of an operation."""
        return {"nodes": [list(node) for node in instance.tree.nodes], "root": instance.tree.root}

    def view(self, row: Mapping[str, Any]) -> ExpressionTree | None:
        if "nodes" not in row:
            return None
        return ExpressionTree(tuple((sign, a, b) for sign, a, b in row["nodes"]), row["root"])

    def sizes(self, view: ExpressionTree, row: Mapping[str, Any]) -> dict[str, Any]:
        """steps: number of operations; path_len: operations that wait for each other."""
        return {"steps": len(view.nodes), "path_len": view.depth}

    def stated(self, row: Mapping[str, Any], answer: str) -> tuple[Fraction, Fraction] | None:
        number = number_of(answer)
        return None if number is None else (number, number)

    def longest(self, difficulty: ArithmeticDifficulty) -> ArithmeticDifficulty:
        return difficulty.model_copy(update={"min_operations": difficulty.max_operations})

    def vocabulary(self, difficulty: ArithmeticDifficulty) -> list[str]:
        if difficulty.form != "terse":
            raise DataError(f'only form = "terse" has a closed vocabulary, got form = "{difficulty.form}"')
        facts = [frame for own in wording.TERSE_FACTS.values() for frame in own]
        texts = [*wording.TERSE_INTROS, *wording.TERSE_QUESTIONS, *facts, *wording.TERSE_NAMES, *wording.TERSE_THINGS]
        words = words_of(*texts, TERSE_SYNTAX, TABLE_SYNTAX, TRACE_SYNTAX)
        top = max(difficulty.max_value, (difficulty.max_operations + 1) * difficulty.max_number)
        return sorted({*words, *map(str, range(top + 1))})


ARITHMETIC = Arithmetic()
