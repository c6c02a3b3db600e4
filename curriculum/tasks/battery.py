"""What every battery of shortcuts shares: rates, the best one, and a linear function of what is seen without order.

A shortcut maps what it sees of a generated instance to an answer, or to None where it has none.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

BAG = "bag_of_numbers"


class Solvable(Protocol):
    """What shortcuts see of an instance."""

    @property
    def total(self) -> int:
        """The right answer."""
        ...


V = TypeVar("V", bound=Solvable)


def rates(views: Iterable[V], shortcuts: Mapping[str, Callable[[V], int | None]]) -> dict[str, float]:
    """Shortcut -> share of the instances that it answers rightly. Raises ValueError without instances."""
    known = list(views)
    if not known:
        raise ValueError("at least one procedure is needed, got none")
    right = [view.total for view in known]
    return {
        name: sum(answer(view) == total for view, total in zip(known, right, strict=True)) / len(known)
        for name, answer in shortcuts.items()
    }


def best_of(found: Mapping[str, float]) -> str:
    """The name of the best shortcut."""
    return max(found, key=found.__getitem__)


class LinearBag(Generic[V]):
    """A linear function of features, one for each group of instances, fitted by least squares; rounded to an integer.

    features: view -> (group, numbers); a group has the same number of them.
    """

    def __init__(self, views: Iterable[V], features: Callable[[V], tuple[int, Sequence[float]]]) -> None:
        """Fits it to ``views``."""
        self._features = features
        rows: dict[int, list[Sequence[float]]] = {}
        right: dict[int, list[float]] = {}
        for view in views:
            group, numbers = features(view)
            rows.setdefault(group, []).append(numbers)
            right.setdefault(group, []).append(float(view.total))
        self.weights: dict[int, NDArray[np.float64]] = {
            group: np.linalg.lstsq(np.array(found, dtype=float), np.array(right[group]))[0]
            for group, found in rows.items()
        }

    def __call__(self, view: V) -> int | None:
        """None for a group that it was not fitted to."""
        group, numbers = self._features(view)
        weights = self.weights.get(group)
        return None if weights is None else round(float(np.dot(numbers, weights)))
