"""Datasets of the Hugging Face hub, through ``datasets``."""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

from isomorph.curriculum.rows.arrow import ArrowRows
from isomorph.engine.config import UserError
from isomorph.engine.foreign import cause_of, shortened

PATIENCE_S = 4.0  # for the hub's first answer


def read_hub(name: str, subset: str | None, split: str | None) -> ArrowRows:
    """The rows of a dataset of the hub; they lie in the cache of ``datasets``, memory-mapped.

    Asks the hub first whether it has the dataset, so that a wrong name, a private dataset and a machine without
    network are told apart within seconds. Without network a dataset that is in the cache is read.

    Raises UserError.
    """
    try:
        import datasets
    except ImportError:
        raise UserError(f"hub:{name}: needs datasets: pip install 'isomorph[data]'") from None
    unreachable = _refuse_unknown(name)
    with _quiet(datasets), _offline(datasets, unreachable is not None):
        try:
            found = datasets.load_dataset(name, subset, split=split)
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
    return ArrowRows(found.data.table, f"hub:{name}")


def _refuse_unknown(name: str) -> str | None:
    """None where the hub has the dataset; the reason where it cannot be reached. Raises UserError where it has not."""
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    error = _error_of_hub(name)
    if isinstance(error, HFValidationError):
        raise UserError(f"hub:{name}: must be the name of a dataset of the hub, OWNER/NAME")
    if isinstance(error, GatedRepoError):
        raise UserError(
            f"hub:{name}: the dataset asks for its conditions to be accepted: accept them on its page, then log in: "
            "hf auth login"
        )
    if isinstance(error, RepositoryNotFoundError):
        raise UserError(
            f"hub:{name}: the hub has no such dataset, or it is private: correct the name, or log in: hf auth login"
        )
    return None if error is None else shortened(cause_of(error))


def _error_of_hub(name: str) -> Exception | None:
    """What the hub's client raises for the dataset. In a thread, because a search for its address has no time limit."""
    from huggingface_hub import HfApi

    raised: list[Exception | None] = []

    def ask() -> None:
        try:
            HfApi().dataset_info(name, timeout=PATIENCE_S)
            raised.append(None)
        except Exception as error:  # of the client or of its HTTP library
            raised.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PATIENCE_S)
    return raised[0] if raised else TimeoutError(f"no answer within {PATIENCE_S} s")


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
    """Context in which ``datasets`` does not try, for minutes, to reach a hub that did not answer."""
    from huggingface_hub import constants

    before = datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    if is_offline:
        datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before
