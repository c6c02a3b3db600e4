"""Generated route tasks: how long the cheapest route between two places of a map takes."""

import random
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from isomorph.curriculum.rewards.families import ROUTES as FAMILY
from isomorph.curriculum.tasks.async_plan import amounts_stated
from isomorph.curriculum.tasks.generator import Written, words_of
from isomorph.curriculum.tasks.longest_path import with_unit
from isomorph.curriculum.tasks.render import spelled
from isomorph.curriculum.tasks.routes.render import TERSE_SYNTAX, TRACE_SYNTAX, fewest_total, render, worked
from isomorph.curriculum.tasks.routes.road_map import (
    RoadGraph,
    RoadMap,
    RouteDifficulty,
    named,
    random_shape,
    structure_of,
    with_weights,
)
from isomorph.curriculum.tasks.routes.shortcuts import SHORTCUTS, features
from isomorph.curriculum.tasks.routes.wording import TERSE, TERSE_PLACES
from isomorph.curriculum.tasks.sieve import SievedGenerator
from isomorph.curriculum.tasks.task import DataError


class Routes(SievedGenerator[RouteDifficulty, RoadMap, RoadGraph]):
    """The cheapest route between two places of a map with weights."""

    family = FAMILY
    trained = ("natural", "graph", "code")
    held_out = ("table",)
    difficulty = RouteDifficulty
    wrong = "wrong path"
    shortcuts = SHORTCUTS
    salt = 2450  # chosen among 3,000 so that both exams get an even share of the structures of 5 and 6 places

    def shape(self, rng: random.Random, difficulty: RouteDifficulty) -> RoadGraph | None:
        return random_shape(rng, difficulty)

    def structure_of(self, shape: RoadGraph) -> str:
        return structure_of(shape)

    def filled(self, rng: random.Random, shape: RoadGraph, difficulty: RouteDifficulty) -> RoadGraph | None:
        return with_weights(rng, shape, difficulty)

    def named(self, rng: random.Random, view: RoadGraph, difficulty: RouteDifficulty) -> RoadMap:
        return named(rng, view, difficulty)

    def features(self, view: RoadGraph) -> tuple[int, Sequence[float]]:
        return features(view)

    def write(
        self,
        rng: random.Random,
        instance: RoadMap,
        difficulty: RouteDifficulty,
        representation: str,
        *,
        is_kept: bool = False,
    ) -> Written:
        self.check_representation(representation)
        question = render(instance, representation, rng, difficulty, is_kept=is_kept)
        return Written(question, lambda is_sequential: worked(instance, sequential=is_sequential))

    def answer(self, instance: RoadMap) -> str:
        return with_unit(instance.graph.total, instance.unit)

    def sequential_answer(self, instance: RoadMap) -> str:
        """That of the route with the fewest roads."""
        return with_unit(fewest_total(instance.graph), instance.unit)

    def facts(self, instance: RoadMap) -> dict[str, Any]:
        graph = instance.graph
        return {
            "num_places": graph.num_places,
            "roads": [list(road) for road in graph.roads],
            "start": graph.start,
            "goal": graph.goal,
            "directed": graph.directed,
            "unit": instance.unit,
        }

    def view(self, row: Mapping[str, Any]) -> RoadGraph | None:
        if "roads" not in row:
            return None
        roads = tuple((a, b, weight) for a, b, weight in row["roads"])
        return RoadGraph(row["num_places"], roads, row["start"], row["goal"], row["directed"])

    def sizes(self, view: RoadGraph, row: Mapping[str, Any]) -> dict[str, Any]:
        """steps: number of places; path_len: roads of the cheapest route."""
        return {"steps": view.num_places, "path_len": view.num_roads}

    def stated(self, row: Mapping[str, Any], answer: str) -> tuple[Fraction, Fraction] | None:
        return amounts_stated(answer, row["unit"])

    def longest(self, difficulty: RouteDifficulty) -> RouteDifficulty:
        return difficulty.model_copy(update={"min_places": difficulty.max_places})

    def vocabulary(self, difficulty: RouteDifficulty) -> list[str]:
        if difficulty.form != "terse":
            raise DataError(f'only form = "terse" has a closed vocabulary, got form = "{difficulty.form}"')
        units = [write(n, difficulty.unit) for n in (1, 2) for write in (with_unit, spelled)]
        words = words_of(*TERSE_PLACES, *TERSE.all, *units, TERSE_SYNTAX, TRACE_SYNTAX)
        return sorted({*words, *map(str, range(difficulty.max_places * difficulty.max_weight + 1))})


ROUTES = Routes()
