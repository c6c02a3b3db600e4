"""What a page and a terminal read of a run folder's JSON: keys and types, so that a broken file is refused by name.

Files may come from other people. Keys that are not listed here are passed on.
"""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from isomorph.engine.config import UserError
from isomorph.engine.foreign import one_line


class _Known(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)


class _Model(_Known):
    type: str
    parameters: int
    dtype: str


class _Machine(_Known):
    gpus: list[str]
    cores: int | None
    cpu_capability: str
    memory_gib: float | None
    threads: int


class Described(_Known):
    """run.json."""

    recipe: dict[str, Any]
    model: _Model
    machine: _Machine
    sampler: str
    seed: int
    versions: dict[str, str | None]
    rows: dict[str, dict[str, Any]] = {}
    files: dict[str, dict[str, Any]] = {}


class _Stage(_Known):
    name: str
    ended_by: str | None


class _Best(_Known):
    step: int
    set: str
    score: float
    folder: str


class Summary(_Known):
    """summary.json."""

    status: str
    reason: str | None = None
    stages: list[_Stage] = []
    weights_sha256: str = ""
    best: _Best | None = None
    floor: dict[str, float | None] = {}
    shortcuts: dict[str, dict[str, float]] = {}


class Step(_Known):
    """A row of steps.jsonl; ``series`` checks the numbers that it takes."""

    step: int = Field(ge=0)
    stage: str
    seconds: float = Field(alias="time/step_s")
    wall_s: float = 0.0


class Response(_Known):
    """A row of a file under completions/."""

    representation: str
    text: str
    reward: float | None
    prompt: str = ""
    correct: bool = False
    advantage: float | None = None
    answered: bool | None = None
    sample: int | None = None


def check(schema: type[BaseModel], value: Any, where: str, must: str) -> None:
    """Raises UserError where ``value`` does not fit ``schema``. ``must``: what ``where`` has to be."""
    try:
        schema.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"])) or "it"
        raise UserError(f"{where} must be {must}: {one_line(key)}: {first['msg'].lower()}") from None


def fits(schema: type[BaseModel], rows: list[Any]) -> bool:
    """Whether every one of ``rows`` fits ``schema``."""
    try:
        for row in rows:
            schema.model_validate(row)
    except ValidationError:
        return False
    return True
