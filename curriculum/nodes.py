"""What the nodes of a run must have in common: the run folder, the recipe, the files it reads, the first weights.

A run of one launcher has them in common anyway, and none of this is read there. Each function is a collective, and
raises UserError on every rank.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from isomorph.curriculum.inputs import describe_files, sha256_of
from isomorph.curriculum.recipe import Recipe
from isomorph.curriculum.resume import differences
from isomorph.engine.config import UserError
from isomorph.engine.distributed.ranks import Ranks
from isomorph.engine.model.policy import Policy
from isomorph.engine.rollout.fingerprint import fingerprint

T = TypeVar("T")


def refuse_other_folder(folder: Path, ranks: Ranks) -> None:
    """Raises UserError where a rank does not see what rank 0 writes into ``folder``."""
    if ranks.num_nodes == 1:
        return
    mark = folder / ranks.from_first(lambda: _marked(folder))
    try:
        found = ranks.gather(mark.is_file())
    finally:
        if ranks.is_first:
            mark.unlink()
    if blind := [rank for rank, is_there in enumerate(found) if not is_there]:
        raise UserError(
            f"{folder} must be one folder for all nodes, {ranks.named(blind)} cannot see what rank 0 "
            f"({ranks.places[0]}) writes there: name one, by its absolute path, on a disk that all nodes share"
        )


def _marked(folder: Path) -> str:
    mark = f".seen-{os.urandom(8).hex()}"  # a new name: a network file system may remember that one is not there
    (folder / mark).touch()
    return mark


def refuse_other_recipe(recipe: Recipe, ranks: Ranks) -> None:
    """Raises UserError where a node's recipe, before its paths are made absolute, is not that of node 0."""
    for node, theirs in _of_nodes(ranks, lambda: recipe):
        if changed := differences(recipe, theirs):
            key, (ours, other) = next(iter(changed.items()))
            raise UserError(
                f"the recipe must be the same on all nodes: {key} is {ours!r} on this node "
                f"({ranks.places[ranks.rank]}) and {other!r} on node {node}"
            )


def refuse_other_files(recipe: Recipe, ranks: Ranks) -> None:
    """Raises UserError where a file that ``recipe`` reads has other content than on node 0, or cannot be read."""
    _refuse_other(lambda: {at: str(told["sha256"]) for at, told in describe_files(recipe).items()}, ranks)


def refuse_other_weights(policy: Policy, ranks: Ranks) -> None:
    """Raises UserError where a node has other weights of the model than node 0.

    ``policy``: before FSDP2's shards are read (``Policy.unread``), else with its weights.
    """
    if policy.unread:
        _refuse_other(lambda: {f"model.path/{file.name}": sha256_of(file) for file in policy.unread}, ranks)
    else:
        _refuse_other(lambda: {"the model's weights": fingerprint(policy.base())}, ranks)


def _refuse_other(describe: Callable[[], dict[str, str]], ranks: Ranks) -> None:
    def told() -> dict[str, str] | str:
        try:
            return describe()
        except UserError as error:
            return str(error)

    known: list[tuple[int, dict[str, str]]] = []
    for node, found in _of_nodes(ranks, told):
        if isinstance(found, str):
            raise UserError(f"on node {node}: {found}")
        known.append((node, found))
    for node, found in known[1:]:
        first = known[0][1]
        if changed := [name for name in {**first, **found} if first.get(name) != found.get(name)]:
            raise UserError(
                f"{changed[0]} must be the same on all nodes, it differs between node 0 and node {node}: copy it from "
                "one to the other"
            )


def _of_nodes(ranks: Ranks, make: Callable[[], T]) -> list[tuple[int, T]]:
    """What ``make`` returns on the first rank of each node, by node; none with one node."""
    if ranks.num_nodes == 1:
        return []
    firsts: dict[int, int] = {}
    for rank, place in enumerate(ranks.places):
        firsts.setdefault(place.node, rank)
    own: Any = make() if ranks.rank in firsts.values() else None
    found = ranks.gather(own)
    return [(node, found[firsts[node]]) for node in sorted(firsts)]
