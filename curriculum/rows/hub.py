"""Datasets of the Hugging Face hub, through ``datasets``."""

import contextlib
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
            why = f"; the hub cannot be reached: {unreachable}" if unreachable else ""
            raise UserError(f"hub:{name}: cannot be loaded: {cause_of(error)}{why}") from None
    if isinstance(found, dict):
        if len(found) > 1:
            raise UserError(f"hub:{name}: name a split: it has {', '.join(found)}")
        (found,) = found.values()
    return ArrowRows(found.data.table, f"hub:{name}")


def _refuse_unknown(name: str) -> str | None:
    """None where the hub has the dataset; the reason where it cannot be reached. Raises UserError where it has not."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        HfApi().dataset_info(name, timeout=PATIENCE_S)
    except GatedRepoError:
        raise UserError(
            f"hub:{name}: the dataset asks for its conditions to be accepted: accept them on its page, then log in: "
            "hf auth login"
        ) from None
    except RepositoryNotFoundError:
        raise UserError(
            f"hub:{name}: the hub has no such dataset, or it is private: correct the name, or log in: hf auth login"
        ) from None
    except (HfHubHTTPError, OSError) as error:
        return shortened(cause_of(error))
    except Exception as error:  # of the HTTP library, which differs between versions
        return shortened(cause_of(error))
    return None


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
