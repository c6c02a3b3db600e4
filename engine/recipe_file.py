"""Reads a recipe: a TOML file, the files it extends, and ``section.key=value`` overrides, as a checked configuration.

Precedence, lowest first: the schema's defaults, the recipe named by ``extends``, the recipe, overrides. A stage's own
``objective``, ``optim``, ``batch`` and ``sampling`` tables lie over the top-level ones; but a stage whose objective has
another ``name`` than the top level takes no key from the top-level ``[objective]``, because its preset differs.
"""

import copy
import difflib
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from isomorph.engine.config import DEFAULT_OBJECTIVE, STAGE_TABLES, Section, UserError
from isomorph.engine.effect import KeyPath, idle_paths, idle_sentences, leaves

C = TypeVar("C", bound=Section)


def load_recipe(path: Path, overrides: list[str], schema: type[C]) -> C:
    """Returns the recipe at ``path`` with ``section.key=value`` overrides as a ``schema``. Raises UserError.

    ``extends = "other.toml"`` takes another recipe as base: tables are merged, all other values are replaced. A key
    that the recipe or an override sets must have an effect; one that only the base sets may have none, because other
    recipes share the base. Validators get the recipe's folder as ``context["folder"]``.
    """
    base, own = _read_toml(path)
    tables = _merged(base, own)
    changed = copy.deepcopy(tables)
    for text in overrides:
        _override(changed, text)
    loaded = _loaded(changed, schema, path)
    try:  # a key of the recipe that only an override makes ineffective is accepted
        as_written = _loaded(tables, schema, path) if overrides else loaded
    except UserError:  # the recipe is complete only with the overrides
        as_written, tables = loaded, changed
    sentences = _idle_in(tables, leaves(own), as_written)
    sentences += _idle_in(changed, (leaf for text in overrides for leaf in _overridden(text)), loaded)
    if sentences:
        raise UserError(f"{path}: " + "; ".join(dict.fromkeys(sentences)))
    return loaded


def load_variant(path: Path, own: dict[str, Any], schema: type[C], *, without: Iterable[KeyPath] = (), where: str) -> C:
    """Returns the recipe at ``path`` with the tables ``own`` over it, as if a recipe with them extended it.

    ``without``: keys of the recipe that are taken out first. ``where``: of ``own``, for messages. Raises UserError.
    """
    tables = read_tables(path)
    for *parents, leaf in without:
        node: Any = tables
        for name in parents:
            node = node.get(name, {})
        node.pop(leaf, None)
    tables = _merged(tables, own)
    loaded = _loaded(tables, schema, path, where)
    if sentences := _idle_in(tables, leaves(own), loaded):
        raise UserError(f"{where}: " + "; ".join(dict.fromkeys(sentences)))
    return loaded


def overridden(tables: dict[str, Any], overrides: Sequence[str], schema: type[C], *, where: str) -> C:
    """Returns ``tables`` of a run.json, changed by overrides. Raises UserError, also if an override has no effect."""
    changed = copy.deepcopy(tables)
    for text in overrides:
        _override(changed, text)
    loaded = check_tables(changed, schema, where=where)
    if sentences := _idle_in(changed, (leaf for text in overrides for leaf in _overridden(text)), loaded):
        raise UserError("; ".join(dict.fromkeys(sentences)))
    return loaded


def _loaded(tables: dict[str, Any], schema: type[C], path: Path, where: str = "") -> C:
    where = where or str(path)
    for name, section in STAGE_TABLES.items():  # so that a defect is reported once and not for each stage
        check_tables(tables.get(name, {}), section, where=where, inside=name)
    return check_tables(_stages_resolved(tables), schema, where=where, folder=path.parent)


def _idle_in(tables: dict[str, Any], given: Iterable[KeyPath], loaded: Section) -> list[str]:
    return idle_sentences(given, idle_paths(loaded), lambda path: _takers(tables, path))


def _takers(tables: dict[str, Any], path: KeyPath) -> list[KeyPath] | None:
    """Returns the paths in the stages that take the value at the top-level ``path``; None if it is not a shared one."""
    if path[0] not in STAGE_TABLES:
        return None
    name, stages = str(path[0]), tables.get("stage", [])
    own = [(i, stage.get(name, {})) for i, stage in enumerate(stages)]
    return [("stage", i, *path) for i, table in own if path[1] not in table and not _is_renamed(name, tables, table)]


def read_tables(path: Path) -> dict[str, Any]:
    """Returns the tables of a TOML file, with those of the files it extends. Raises UserError."""
    return _merged(*_read_toml(path))


def _read_toml(path: Path, extended_by: tuple[Path, ...] = ()) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the merged tables of all recipes that this one extends, and its own tables."""
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file; the recipe must be a TOML file, for example curriculum/recipes/quickstart.toml"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: the recipe cannot be read: {error}") from None
    except (ValueError, RecursionError) as error:  # TOML's own errors, numbers of thousands of digits, deep nesting
        raise UserError(f"{path}: not valid TOML: {error}") from None
    base = tables.pop("extends", None)
    if base is None:
        return {}, tables
    chain = (*extended_by, path.resolve())
    if not isinstance(base, str) or "\0" in base or (path.parent / base).resolve() in chain:
        raise UserError(f"{path}: extends must name another recipe, without a cycle, got {base!r}")
    return _merged(*_read_toml(path.parent / base, chain)), tables


def _merged(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    both = {
        key: _merged(under[key], value) if isinstance(value, dict) and isinstance(under.get(key), dict) else value
        for key, value in over.items()
    }
    return {**under, **both}


def check_tables(
    tables: dict[str, Any], schema: type[C], *, where: str, inside: str = "", folder: Path | None = None
) -> C:
    """Returns ``tables`` as ``schema``. Raises one UserError with all defects.

    ``where``: file, for the message. ``inside``: name of the table that ``tables`` are the content of. ``folder``: what
    validators get as ``context["folder"]``; None: the working folder.
    """
    try:
        return schema.model_validate(tables, context={"folder": folder or Path()})
    except ValidationError as error:
        defects = error.errors(include_url=False)
        causes = [d for d in defects if not any(_is_around(d["loc"], other["loc"]) for other in defects)]
        lines = [_explain(schema, tables, defect, inside) for defect in causes]
        raise UserError(f"{where}: " + "; ".join(lines)) from None


def _is_around(loc: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    """Whether ``loc`` contains ``other``: a list with one wrong item is reported as too short, too."""
    return len(loc) < len(other) and other[: len(loc)] == loc


def _overridden(text: str) -> list[KeyPath]:
    """Returns the paths that an override sets."""
    key, _, value = text.partition("=")
    at = tuple(int(name) if _is_number(name) else name for name in key.strip().split("."))
    return list(leaves(toml_value(value.strip()), at))


def _override(tables: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise UserError(f"an override must read section.key=value, got {text!r}")
    *parents, leaf = key.strip().split(".")
    node: Any = tables
    for name in parents:
        node = _child(node, name, text)
    if isinstance(node, list):
        raise UserError(f"override {text!r}: stages are numbered from 0: write for example stage.0.steps=10")
    if not isinstance(node, dict):
        raise UserError(
            f"override {text!r}: {parents[-1]} must be a table to have the key {leaf!r}, got the value {node!r}"
        )
    node[leaf] = toml_value(value.strip())


def _is_number(name: str) -> bool:
    """Whether it is a stage's number: ``int`` does not read every digit of Unicode, and not thousands of them."""
    return name.isascii() and name.isdigit() and len(name) < 10


def _child(node: Any, name: str, text: str) -> Any:
    if isinstance(node, dict):
        return node.setdefault(name, {})
    if isinstance(node, list) and _is_number(name) and int(name) < len(node):
        return node[int(name)]
    if isinstance(node, list):
        raise UserError(f"override {text!r}: {name!r} must be a stage's number, 0 to {len(node) - 1}")
    raise UserError(f"override {text!r}: {name!r} must be in a table, got the value {node!r}")


def toml_value(text: str) -> Any:
    """Parses ``text`` as a TOML value; what is not one is taken as a string."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return text


def _stages_resolved(tables: dict[str, Any]) -> dict[str, Any]:
    """Returns ``tables`` with the top-level objective, optim, batch and sampling merged into each stage's own."""
    defaults = {name: tables.get(name, {}) for name in STAGE_TABLES}
    rest = {key: value for key, value in tables.items() if key not in STAGE_TABLES}
    stages = tables.get("stage")
    if not isinstance(stages, list) or not all(isinstance(s, dict) for s in stages):
        return rest
    return {**rest, "stage": [{**stage, **_layered(defaults, stage)} for stage in stages]}


def _layered(defaults: dict[str, Any], stage: dict[str, Any]) -> dict[str, Any]:
    layered = {}
    for name, table in defaults.items():
        own = stage.get(name, {})
        if not isinstance(own, dict) or not isinstance(table, dict):
            layered[name] = own or table
            continue
        layered[name] = dict(own) if _is_renamed(name, defaults, own) else {**table, **own}
    return layered


def _is_renamed(name: str, defaults: dict[str, Any], own: dict[str, Any]) -> bool:
    """Whether a stage names another objective than the top level: then it takes no key of the top-level table."""
    known = defaults.get(name, {}).get("name", DEFAULT_OBJECTIVE)
    return name == "objective" and "name" in own and own["name"] != known


def _explain(schema: type[BaseModel], tables: dict[str, Any], defect: Any, inside: str) -> str:
    loc = defect["loc"]
    # of a table that is told apart by its kind, pydantic names the kind, too
    given = defect["input"]
    is_of_kind = defect["type"] == "value_error" and isinstance(given, dict) and loc[-1:] == (given.get("kind"),)
    where = ".".join([inside] * bool(inside) + _as_written(tables, loc[:-1] if is_of_kind else loc)) or "recipe"
    if defect["type"] == "extra_forbidden":
        return f"{where}: unknown key{_nearest(schema, loc)}"
    if defect["type"] == "missing":
        return f"{where}: must be given"
    message = defect["msg"].removeprefix("Value error, ")
    got = "" if isinstance(defect["input"], (dict, list, tuple, BaseModel)) else f", got {defect['input']!r}"
    return f"{where}: {message[0].lower()}{message[1:]}{got}"


def _as_written(tables: Any, loc: tuple[Any, ...]) -> list[str]:
    """Returns the keys and list indices of ``loc``, without the union tags that pydantic inserts."""
    path: list[str] = []
    for i, part in enumerate(loc):
        is_here = part in tables if isinstance(tables, dict) else isinstance(part, int)
        if not is_here and i < len(loc) - 1:
            continue
        path.append(str(part))
        is_inside = is_here and (isinstance(tables, dict) or (isinstance(tables, list) and int(part) < len(tables)))
        tables = tables[part] if is_inside else None
    return path


def _nearest(schema: type[BaseModel], loc: tuple[Any, ...]) -> str:
    models: list[type[BaseModel]] = [schema]
    for part in loc[:-1]:
        inside = [m.model_fields[part].annotation for m in models if part in m.model_fields]
        tagged = [m for m in models if any(get_args(f.annotation) == (part,) for f in m.model_fields.values())]
        if inside:
            models = [model for annotation in inside for model in _models_in(annotation)]
        elif tagged:  # one of several kinds of table, told apart by a key
            models = tagged
    keys = sorted({key for model in models for key in model.model_fields})
    near = difflib.get_close_matches(str(loc[-1]), keys, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; known keys: {', '.join(keys)}"


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models_in(part)]
