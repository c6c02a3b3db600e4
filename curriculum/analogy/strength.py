"""Strength of the analogy between two procedures, after arXiv 2602.03542 (structure mapping).

    strength = 0.4 * unary + 0.6 * binary        in 0..1; 1 for the same procedure

    unary    Jaccard index of the histograms of step durations: sum of the smaller counts / sum of the larger ones
    binary   Weisfeiler-Lehman subtree kernel of the order (Shervashidze et al. 2011), normalised by the root of the
             graphs' own values; all steps begin with one colour, then three times a step's colour becomes that of
             its colour, those of its predecessors and those of its successors

The paper's code is not public. It says neither how durations are binned nor what steps are coloured with at first or
whether START and END belong to the graph: here every duration is a bin of its own, steps begin alike, and the graph has
the steps alone. Needs scipy (extra ``study``).
"""

from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np
from scipy import sparse

from isomorph.curriculum.analogy.structure import Structure

UNARY_WEIGHT = 0.4
ROUNDS = 3
ROWS_AT_ONCE = 256  # of the matrix of strengths: bounds what is dense besides the result


def strengths(targets: Sequence[Structure], bases: Sequence[Structure]) -> np.ndarray:
    """Strength of every target (rows) with every base (columns), float64."""
    histograms = [_tallies(one.durations) for one in (*targets, *bases)]
    colours = [_colour_counts(one) for one in (*targets, *bases)]
    unary_T, unary_B = _split(_matrix(histograms), len(targets))
    binary_T, binary_B = (_unit_rows(m) for m in _split(_matrix(colours), len(targets)))
    sizes = np.array([len(one.durations) for one in (*targets, *bases)], dtype=np.float64)
    found = np.empty((len(targets), len(bases)))
    for start in range(0, len(targets), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        common = (unary_T[rows] @ unary_B.T).toarray()
        either = sizes[: len(targets), None][rows] + sizes[len(targets) :] - common
        binary = (binary_T[rows] @ binary_B.T).toarray()
        found[rows] = UNARY_WEIGHT * common / either + (1 - UNARY_WEIGHT) * binary
    return np.clip(found, 0.0, 1.0)  # the kernel of equal graphs is 1 up to rounding


def _tallies(values: Sequence[Hashable]) -> Counter[Hashable]:
    """The k-th occurrence of a value as a feature of its own: the product of two such rows sums the smaller counts."""
    seen: Counter[Hashable] = Counter()
    for value in values:
        seen[value] += 1
    return Counter({(value, k): 1 for value, count in seen.items() for k in range(count)})


def _colour_counts(one: Structure) -> Counter[Hashable]:
    """How often each colour of each round occurs. A colour is the tree that it stands for."""
    after = [[j for j, before in enumerate(one.predecessors) if i in before] for i in range(len(one.durations))]
    colours: list[Hashable] = [()] * len(one.durations)
    counts: Counter[Hashable] = Counter((0, colour) for colour in colours)
    for step in range(1, ROUNDS + 1):
        colours = [
            (colours[j], _bag(colours, before), _bag(colours, after[j])) for j, before in enumerate(one.predecessors)
        ]
        counts.update((step, colour) for colour in colours)
    return counts


def _bag(colours: Sequence[Hashable], steps: Sequence[int]) -> tuple[Hashable, ...]:
    return tuple(sorted((colours[i] for i in steps), key=repr))


def _matrix(rows: Sequence[Counter[Hashable]]) -> sparse.csr_array:
    """A row for each counter, a column for each feature."""
    column: dict[Hashable, int] = {}
    places = [[column.setdefault(feature, len(column)) for feature in row] for row in rows]
    ends = np.cumsum([0, *map(len, places)])
    indices = [place for row in places for place in row]
    data = [float(count) for row in rows for count in row.values()]
    return sparse.csr_array((data, indices, ends), shape=(len(rows), max(1, len(column))))


def _split(matrix: sparse.csr_array, num_first: int) -> tuple[sparse.csr_array, sparse.csr_array]:
    return matrix[:num_first], matrix[num_first:]


def _unit_rows(matrix: sparse.csr_array) -> sparse.csr_array:
    norms = np.sqrt(np.asarray(matrix.multiply(matrix).sum(axis=1)).ravel())
    return sparse.csr_array(sparse.diags_array(1 / norms) @ matrix)
