"""Draws procedures of a split and a hardness; the whole battery of shortcuts of a difficulty."""

import functools
import random
from collections.abc import Mapping

from isomorph.curriculum.tasks.batch import fitted_weights
from isomorph.curriculum.tasks.battery import BAG
from isomorph.curriculum.tasks.procedure import (
    Difficulty,
    Procedure,
    is_wide_enough,
    named,
    random_graph,
    random_procedure,
)
from isomorph.curriculum.tasks.shortcuts import SHORTCUTS, BagOfNumbers, Shortcut, is_solved
from isomorph.curriculum.tasks.split import Part, part_of
from isomorph.curriculum.tasks.task import DataError, Split

MAX_DRAWS = 10_000


def draw(rng: random.Random, difficulty: Difficulty, *, split: Split) -> Procedure:
    """A random procedure of the given difficulty that belongs to ``split``. No procedure belongs to two.

    With probability ``hard_share`` it is one that no shortcut of ``battery(difficulty)`` solves.

    Raises:
        ValueError: an unknown split.
        DataError: MAX_DRAWS attempts gave no such procedure; the limits may contradict each other.
    """
    part = part_of(split)
    is_hard = difficulty.hard_share > 0 and rng.random() < difficulty.hard_share
    if not is_hard:
        return _drawn(rng, difficulty, part, is_hard=False)
    bag = bag_of_numbers(difficulty)
    for _ in range(MAX_DRAWS):
        procedure = _drawn(rng, difficulty, part, is_hard=True)
        graph = procedure.graph
        if bag(graph) != graph.total:
            return procedure
    raise DataError(f"the bag of numbers solves all procedures of {difficulty}: raise max_duration or max_steps")


@functools.lru_cache(maxsize=64)
def bag_of_numbers(difficulty: Difficulty) -> BagOfNumbers:
    """Fitted to procedures of this difficulty, once in a process."""
    return BagOfNumbers(fitted_weights(difficulty))


def battery(difficulty: Difficulty) -> Mapping[str, Shortcut]:
    """All shortcuts by name, with the bag of numbers of this difficulty."""
    return {**SHORTCUTS, BAG: bag_of_numbers(difficulty)}


def _drawn(rng: random.Random, difficulty: Difficulty, part: Part, *, is_hard: bool) -> Procedure:
    """``is_hard``: none of SHORTCUTS solves it; the bag of numbers is not asked."""
    for _ in range(MAX_DRAWS):
        procedure = _hard(rng, difficulty, part) if is_hard else random_procedure(rng, difficulty)
        if procedure is None or not is_wide_enough(procedure, difficulty):
            continue
        if procedure.part(difficulty.split_by) == part:  # last: with split_by = "procedure" it takes longest
            return procedure
    asked = "that no shortcut solves " if is_hard else ""
    raise DataError(
        f"the difficulty must allow procedures {asked}for the {part} split, got none in {MAX_DRAWS} draws with "
        f"{difficulty}; widen the width, the edge probability, the predecessors or the durations"
    )


def _hard(rng: random.Random, difficulty: Difficulty, part: Part) -> Procedure | None:
    """One attempt at a procedure of ``part`` that none of SHORTCUTS solves."""
    drawn = random_graph(rng, difficulty, part)
    if drawn is None or is_solved(drawn[1]):
        return None
    durations, graph = drawn
    return named(rng, difficulty, durations, graph.predecessors)
