"""Shortcuts of route questions: answers without comparing all routes.

Each follows one route, makes one pass, or looks at routes of two roads; none keeps the least distance of every place.
"""

from collections.abc import Callable, Mapping, Sequence

from isomorph.curriculum.tasks.routes.road_map import RoadGraph

Links = Sequence[Sequence[tuple[int, int]]]


def sum_of_all(graph: RoadGraph) -> int | None:
    """The sum of all weights."""
    return sum(weight for _, _, weight in graph.roads)


def longest_road(graph: RoadGraph) -> int | None:
    return max(weight for _, _, weight in graph.roads)


def shortest_road(graph: RoadGraph) -> int | None:
    return min(weight for _, _, weight in graph.roads)


def direct_road(graph: RoadGraph) -> int | None:
    """The road from the start to the goal; None without one."""
    return graph.weight(graph.start, graph.goal)


def fewest_roads(graph: RoadGraph) -> int | None:
    """The route with the fewest roads; of several the one that is found first by number."""
    return sum(graph.weight(a, b) or 0 for a, b in zip(graph.fewest, graph.fewest[1:], strict=False))


def at_most_two_roads(graph: RoadGraph) -> int | None:
    """The cheapest of the routes with one or two roads; None without any."""
    direct = [graph.weight(graph.start, graph.goal)]
    for via, first in graph.neighbours[graph.start]:
        second = graph.weight(via, graph.goal)
        direct.append(None if second is None else first + second)
    return min((total for total in direct if total is not None), default=None)


def nearest_neighbour(graph: RoadGraph) -> int | None:
    """From the start always along the cheapest road to a new place; None where that ends before the goal."""
    return _nearest(graph.neighbours, graph.start, graph.goal)


def nearest_neighbour_back(graph: RoadGraph) -> int | None:
    """The same from the goal back to the start."""
    return _nearest(graph.backward, graph.goal, graph.start)


def nearest_until_direct(graph: RoadGraph) -> int | None:
    """As ``nearest_neighbour``, but where a road leads to the goal it is taken."""
    return _nearest(graph.neighbours, graph.start, graph.goal, takes_direct=True)


def in_order_of_listing(graph: RoadGraph) -> int | None:
    """Distances in one pass over the places by number: a place that is not reached yet is passed over."""
    known = {graph.start: 0}
    for place in range(graph.num_places):
        if place in known:
            for other, weight in graph.neighbours[place]:
                known[other] = min(known.get(other, known[place] + weight), known[place] + weight)
    return known.get(graph.goal)


def _nearest(links: Links, start: int, goal: int, *, takes_direct: bool = False) -> int | None:
    place, total, seen = start, 0, {start}
    while place != goal:
        ahead = [(weight, other) for other, weight in links[place] if other not in seen]
        direct = [found for found in ahead if found[1] == goal] if takes_direct else []
        if not ahead:
            return None
        weight, place = min(direct or ahead)
        total += weight
        seen.add(place)
    return total


SHORTCUTS: Mapping[str, Callable[[RoadGraph], int | None]] = {
    function.__name__: function
    for function in (
        nearest_neighbour,
        nearest_neighbour_back,
        nearest_until_direct,
        fewest_roads,
        in_order_of_listing,
        at_most_two_roads,
        direct_road,
        longest_road,
        shortest_road,
        sum_of_all,
    )
}


def features(graph: RoadGraph) -> tuple[int, Sequence[float]]:
    """Number of places; 1, and numbers of the weights without their order, and of the roads at start and goal."""
    weights = [weight for _, _, weight in graph.roads]
    ahead = [weight for _, weight in graph.neighbours[graph.start]]
    back = [weight for _, weight in graph.backward[graph.goal]]
    direct = direct_road(graph)
    return graph.num_places, [
        1.0,
        len(weights),
        sum(weights),
        min(weights),
        max(weights),
        float(direct is not None),
        direct or 0,
        len(ahead),
        min(ahead),
        len(back),
        min(back),
    ]
