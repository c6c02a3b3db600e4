"""Keys of procedures, which do not depend on the numbering of their steps."""

import hashlib
from collections.abc import Hashable, Sequence

from isomorph.curriculum.tasks.longest_path import Predecessors, topological_order


def canonical_key(labels: Sequence[Hashable], predecessors: Predecessors) -> str:
    """16 hexadecimal digits that do not depend on how the steps are numbered.

    labels: what identifies a step besides its place in the order, such as its duration; compared by ``repr``. Colours
    are refined over the transitive closure, so a redundant edge changes nothing. Different procedures may share a key
    (colour refinement does not tell every pair of graphs apart); equal ones never have two.
    """
    above = _ancestors(predecessors)
    below = [[k for k, ancestors in enumerate(above) if j in ancestors] for j in range(len(labels))]
    colours = [_digest(label) for label in labels]
    while True:
        finer = [
            _digest(
                colour,
                sorted(colours[i] for i in above[j]),
                sorted(colours[k] for k in below[j]),
            )
            for j, colour in enumerate(colours)
        ]
        if len(set(finer)) == len(set(colours)):
            return _digest(sorted(finer))
        colours = finer


def relation_key(labels: Sequence[str], links: Sequence[Sequence[tuple[tuple[str, int], int]]]) -> str:
    """16 hexadecimal digits that do not depend on how the nodes are numbered.

    ``links[j]``: label and number of each node that node j is linked with. As with ``canonical_key`` different graphs
    may share a key, equal ones never have two.
    """
    rank = {label: k for k, label in enumerate(sorted(set(labels)))}
    colours = [rank[label] for label in labels]
    history: list[object] = [sorted(labels)]
    while True:
        seen = [(colours[j], sorted((label, colours[k]) for label, k in own)) for j, own in enumerate(links)]
        ordered = sorted(seen)
        history.append(ordered)
        distinct = [one for k, one in enumerate(ordered) if k == 0 or one != ordered[k - 1]]
        if len(distinct) == len(set(colours)):
            return _digest(history)
        colours = [distinct.index(one) for one in seen]


def _ancestors(predecessors: Predecessors) -> list[set[int]]:
    above: list[set[int]] = [set() for _ in predecessors]
    for j in topological_order(predecessors):
        above[j] = set(predecessors[j]).union(*(above[i] for i in predecessors[j]))
    return above


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
