"""The Hugging Face hub: its first answer within seconds, and its cache where it does not answer."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

from isomorph.engine.config import UserError
from isomorph.engine.foreign import cause_of, shortened

Answer = TypeVar("Answer")

PATIENCE_S = 4.0  # for the hub's first answer


@contextlib.contextmanager
def hub_model(name: str) -> Iterator[list[str]]:
    """Context in which transformers loads the model ``name`` (OWNER/NAME) of the hub, or what its cache has of it.

    The hub is asked first, once: without network transformers tries each file again, for a minute in all.
    Yields a note where the cache is used because the hub did not give the model.

    Raises UserError where neither of them has it.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        is_cached = isinstance(try_to_load_from_cache(name, "config.json"), str)
    except HFValidationError:
        raise UserError(f"model.path: must be a folder, a .gguf file, or OWNER/NAME on the hub, got {name!r}") from None
    if constants.HF_HUB_OFFLINE:
        error: Exception | None = ConnectionError("HF_HUB_OFFLINE is set")
    else:
        address = hf_hub_url(name, "config.json")
        _, error = first_answer(lambda: get_hf_file_metadata(address, timeout=2 * PATIENCE_S))
    if error is None:
        yield []
        return
    if not is_cached:
        raise UserError(f"model.path: {name}: {_refusal(error)}")
    with without_hub():
        yield [f"{name} is read from the hub's cache on this machine: {shortened(cause_of(error))}"]


def _refusal(error: Exception) -> str:
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, RepositoryNotFoundError

    if isinstance(error, GatedRepoError):
        return "the model asks for its conditions to be accepted: accept them on its page, then log in: hf auth login"
    if isinstance(error, RepositoryNotFoundError):
        return "the hub has no such model, or it is private: correct the name, or log in: hf auth login"
    if isinstance(error, EntryNotFoundError):
        return "the hub has it, but without a config.json: name a model in the format of transformers"
    return (
        f"the hub cannot be reached ({shortened(cause_of(error))}), and the model is not in its cache on this machine: "
        "connect this machine, or name a folder"
    )


def first_answer(ask: Callable[[], Answer]) -> tuple[Answer | None, Exception | None]:
    """What ``ask`` returns within PATIENCE_S, or what it raises; a TimeoutError where it does neither.

    In a thread, because a search for the hub's address has no time limit. Of a limit of the client's own that is equal
    to PATIENCE_S either might come first, each with its own words: give it a larger one.
    """
    answered: list[tuple[Answer | None, Exception | None]] = []

    def run() -> None:
        try:
            answered.append((ask(), None))
        except Exception as error:  # of the client or of its HTTP library
            answered.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(PATIENCE_S)
    return answered[0] if answered else (None, TimeoutError(f"no answer within {PATIENCE_S} s"))


@contextlib.contextmanager
def without_hub() -> Iterator[None]:
    """Context in which the hub's client does not try, for minutes, to reach a hub that did not answer."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
