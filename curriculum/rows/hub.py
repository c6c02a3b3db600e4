"""Datasets of the Hugging Face hub, through ``datasets``: ``NAME``, or ``NAME@REVISION``.

The hub is asked first, in seconds. A download may take any time as long as something arrives: after QUIET_S without a
sentence says so, after STALLED_S it is given up.
"""

import contextlib
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from isomorph.curriculum.rows.arrow import ArrowRows
from isomorph.engine.config import UserError
from isomorph.engine.foreign import cause_of, printable, shortened
from isomorph.engine.hub import PATIENCE_S, first_answer, without_hub

QUIET_S = 4.0  # without anything arriving, until that is said
STALLED_S = 60.0  # until it is given up; the hub's client tries again within it
POLL_S = 0.2
_COMMIT = re.compile("[0-9a-f]{40}")


def read_hub(name: str, subset: str | None, split: str | None) -> ArrowRows:
    """The rows of a dataset of the hub; they lie in the cache of ``datasets``, memory-mapped.

    Asks the hub first whether it has the dataset, so that a wrong name, a private dataset and a machine without
    network are told apart within seconds. Without network a dataset that is in the cache is read.

    Raises UserError.
    """
    datasets = _datasets(name)
    repo, revision = _parts(name)
    commit, unreachable = _ask(name)
    with _quiet(datasets), _offline(datasets, unreachable is not None):
        try:
            wanted = commit or revision
            found = _watched(lambda: datasets.load_dataset(repo, subset, split=split, revision=wanted), repo, datasets)
        except UserError:
            raise
        except Exception as error:  # datasets raises nearly anything for what it cannot load
            if unreachable:
                raise UserError(
                    f"hub:{name}: the hub cannot be reached ({unreachable}), and the dataset is not in the cache of "
                    "datasets: connect this machine, or name a file"
                ) from None
            raise UserError(f"hub:{name}: cannot be loaded: {cause_of(error)}") from None
    if isinstance(found, dict):
        if len(found) > 1:
            raise UserError(f"hub:{name}: name a split: it has {', '.join(found)}")
        (found,) = found.values()
    cached = {Path(file["filename"]).parent.name for file in found.cache_files}
    if unreachable and revision is not None and cached != {revision}:
        raise UserError(
            f"hub:{name}: the hub cannot be reached ({unreachable}), and the cache of datasets has another revision, "
            f"{', '.join(sorted(cached))}: connect this machine"
        )
    return ArrowRows(found.data.table, f"hub:{name}")


def with_revision(name: str) -> str:
    """``name`` with the commit that its rows are read from now: NAME@COMMIT; as it is, where that is not known.

    Raises UserError where the hub has no such dataset.
    """
    repo, _ = _parts(name)
    datasets = _datasets(name)
    commit, unreachable = _ask(name)
    if unreachable:  # then datasets reads the newest revision in its cache
        folders = Path(datasets.config.HF_DATASETS_CACHE).expanduser().glob(f"{_cached_as(repo)}/*/*/*")
        commits = [folder for folder in folders if _COMMIT.fullmatch(folder.name)]
        commit = max(commits, key=lambda folder: folder.stat().st_mtime).name if commits else None
    return name if commit is None else f"{repo}@{commit}"


def _datasets(name: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise UserError(f"hub:{name}: needs datasets: pip install 'isomorph[data]'") from None
    return datasets


def _parts(name: str) -> tuple[str, str | None]:
    repo, _, revision = name.partition("@")
    return repo, revision or None


def _cached_as(repo: str) -> str:
    """How the cache of ``datasets`` calls the folder of a dataset."""
    *owner, own = repo.split("/")
    snake = re.sub("([a-z0-9])([A-Z])", r"\1_\2", re.sub("([A-Z]+)([A-Z][a-z])", r"\1_\2", own)).lower()
    return "___".join((*owner, snake))


def _watched(load: Callable[[], Any], repo: str, datasets: Any) -> Any:
    """What ``load`` returns or raises; in a thread, while the files that it writes are looked at. Raises UserError."""
    from huggingface_hub import constants

    cache = Path(datasets.config.HF_DATASETS_CACHE).expanduser()
    folders = (Path(constants.HF_HUB_CACHE) / f"datasets--{repo.replace('/', '--')}", cache / _cached_as(repo))
    done: list[Any] = []
    raised: list[BaseException] = []

    def run() -> None:
        try:
            done.append(load())
        except BaseException as error:  # it is raised again in the caller's thread
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    seen, since, is_said = _files(folders), time.monotonic(), False
    while thread.is_alive():
        thread.join(POLL_S)
        if (now := _files(folders)) != seen:
            seen, since, is_said = now, time.monotonic(), False
        waited = time.monotonic() - since
        if waited > STALLED_S:
            raise UserError(
                f"hub:{repo}: nothing arrived from the hub for {STALLED_S:g} s: start again, which keeps what has "
                "arrived, or download the dataset and name its folder"
            )
        if waited > QUIET_S and not is_said and thread.is_alive():
            is_said = True
            sys.stderr.write(
                f"note: hub:{printable(repo)}: nothing has arrived from the hub for {QUIET_S:g} s; it is given up "
                f"after {STALLED_S:g} s\n"
            )
    if raised:
        raise raised[0]
    return done[0]


def _files(folders: tuple[Path, ...]) -> dict[str, tuple[int, int]]:
    """Size and time of all files under ``folders``."""
    found = {}
    for folder in folders:
        for place, _, names in os.walk(folder):
            for name in names:
                with contextlib.suppress(OSError):  # it was moved just now
                    state = os.stat(os.path.join(place, name))
                    found[os.path.join(place, name)] = state.st_size, state.st_mtime_ns
    return found


def _ask(name: str) -> tuple[str | None, str | None]:
    """The commit of the dataset, or why the hub cannot be reached. Raises UserError where the hub has no such one."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if constants.HF_HUB_OFFLINE:
        return None, "HF_HUB_OFFLINE is set"
    repo, revision = _parts(name)
    asked, error = first_answer(lambda: HfApi().dataset_info(repo, revision=revision, timeout=2 * PATIENCE_S))
    if isinstance(error, HFValidationError):
        raise UserError(f"hub:{name}: must be the name of a dataset of the hub, OWNER/NAME")
    if isinstance(error, GatedRepoError):
        raise UserError(
            f"hub:{name}: the dataset asks for its conditions to be accepted: accept them on its page, then log in: "
            "hf auth login"
        )
    if isinstance(error, RevisionNotFoundError):
        raise UserError(f"hub:{name}: the hub has the dataset, but not (or no longer) this revision")
    if isinstance(error, RepositoryNotFoundError):
        raise UserError(
            f"hub:{name}: the hub has no such dataset, or it is private: correct the name, or log in: hf auth login"
        )
    return None if asked is None else asked.sha, None if error is None else shortened(cause_of(error))


@contextlib.contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    was_shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if was_shown:
            datasets.enable_progress_bars()


@contextlib.contextmanager
def _offline(datasets: Any, is_offline: bool) -> Iterator[None]:
    """Context in which ``datasets`` does not try to reach a hub that did not answer."""
    if not is_offline:
        yield
        return
    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = True
    try:
        with without_hub():
            yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before
