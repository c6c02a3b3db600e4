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


def _ancestors(predecessors: Predecessors) -> list[set[int]]:
    above: list[set[int]] = [set() for _ in predecessors]
    for j in topological_order(predecessors):
        above[j] = set(predecessors[j]).union(*(above[i] for i in predecessors[j]))
    return above


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
