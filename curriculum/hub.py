"""``run.push_to_hub``: uploads a finished run's model to the Hugging Face hub, or to where HF_ENDPOINT points.

huggingface_hub comes with transformers. What can fail is tried before the first step: the token, and the repository,
which is made then, private unless it exists.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from isomorph.engine.config import UserError
from isomorph.engine.foreign import cause_of
from isomorph.engine.types import RunFailed


def prepare_push(repo: str | None) -> None:
    """Makes the repository if ``repo`` is given and it does not exist. Raises UserError where that is not possible."""
    if repo is None:
        return
    import huggingface_hub

    if huggingface_hub.get_token() is None:
        raise UserError(
            f'run.push_to_hub = "{repo}" needs a token of the hub: log in with hf auth login, set HF_TOKEN, or remove '
            "the key"
        )
    with _explained(f'run.push_to_hub: the repository "{repo}" can be neither made nor written to', UserError):
        _api().create_repo(repo, private=True, exist_ok=True)
        _api().auth_check(repo, write=True)  # an existing repository of others is found, too


def push(repo: str | None, model: Path) -> str | None:
    """Uploads the folder ``model`` as one commit; returns its address, or None without ``repo``. Raises RunFailed."""
    if repo is None:
        return None
    retry = f"hf upload {repo} {model}"
    with _explained(f"the run is done, but its model could not be pushed to {repo} (again: {retry})", RunFailed):
        return str(
            _api().upload_folder(repo_id=repo, folder_path=model, commit_message="Add the model of a run").commit_url
        )


def _api() -> Any:
    import huggingface_hub

    # read here, because huggingface_hub reads it once, when it is imported
    return huggingface_hub.HfApi(endpoint=os.environ.get("HF_ENDPOINT"), library_name="isomorph")


@contextlib.contextmanager
def _explained(sentence: str, kind: type[Exception]) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # its own kinds, those of its HTTP client, and OSError
        raise kind(f"{sentence}: {cause_of(error)}") from error
