"""The JSON schema of a tool, from a Python function's signature and docstring."""

from collections.abc import Callable
from typing import Any


def tool_schema(function: Callable[..., Any]) -> dict[str, Any]:
    """As chat templates take it: ``{"type": "function", "function": {"name", "description", "parameters"}}``.

    Every argument needs a type hint and a line under ``Args:`` in the docstring: else ValueError.
    """
    from transformers.utils import get_json_schema

    try:
        return get_json_schema(function)
    except Exception as error:  # of transformers' own types, which differ between versions
        raise ValueError(f"tool {getattr(function, '__name__', function)}: {error}") from error
