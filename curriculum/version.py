"""The version of isomorph that runs."""

import importlib.metadata


def installed_version() -> str:
    """Such as "0.1.0"; "from a source tree" where Python finds the packages without an installation."""
    try:
        return importlib.metadata.version("isomorph")
    except importlib.metadata.PackageNotFoundError:
        return "from a source tree"
