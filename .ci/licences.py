"""Writes docs/licences.md: the licence of every package that isomorph installs, from the packages' own metadata.

    python .ci/licences.py     with the base packages and the extras installed; the rest is listed as not installed

Base packages with all that they depend on, extras with the packages that they name.
"""

import datetime
import importlib.metadata
import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "licences.md"
ADDED = {  # what is compiled or linked into the wheel
    "nanobind": "BSD-3-Clause, with robin-map (MIT): linked statically into the C++ module",
    "GCC's libgomp and libstdc++": "GPL-3.0-or-later with the GCC Runtime Library Exception: linked dynamically",
}


def declared() -> dict[str, list[Requirement]]:
    """The requirements of pyproject.toml: those of "base", and those of each extra."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    tables = {"base": project["dependencies"], **project["optional-dependencies"]}
    found = {part: [Requirement(line) for line in lines] for part, lines in tables.items()}
    return {part: [one for one in some if one.name != project["name"]] for part, some in found.items()}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def licence_of(package: importlib.metadata.Distribution) -> str:
    """The SPDX expression; else the classifiers; else the first line of the field of free text."""
    facts = package.metadata
    if expression := facts.get("License-Expression"):
        return expression
    classifiers = [line for line in facts.get_all("Classifier") or () if line.startswith("License :: ")]
    named = [line.rpartition(" :: ")[2] for line in classifiers if not line.endswith("OSI Approved")]
    text = (facts.get("License") or "").strip().splitlines()
    return ", ".join(named) or (text[0][:80] if text else "not stated in its metadata")


def closure(names: list[str]) -> set[str]:
    """The installed packages that these need, without extras, themselves included."""
    found: set[str] = set()
    waiting = [canonical(name) for name in names]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        try:
            needed = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        parsed = map(Requirement, needed)
        waiting += [canonical(one.name) for one in parsed if one.marker is None or one.marker.evaluate({"extra": ""})]
    return found


def rows() -> list[tuple[str, str, str, str]]:
    """(package, version, licence, what needs it), sorted."""
    tables = declared()
    needed_by: dict[str, list[str]] = {name: ["base"] for name in closure([one.name for one in tables["base"]])}
    for part, some in tables.items():
        for one in some if part != "base" else ():
            needed_by.setdefault(canonical(one.name), []).append(f"`.[{part}]`")
    found = []
    for name, parts in sorted(needed_by.items()):
        try:
            package = importlib.metadata.distribution(name)
            found.append((name, package.version, licence_of(package), ", ".join(parts)))
        except importlib.metadata.PackageNotFoundError:
            found.append((name, "-", "not installed where this list was made", ", ".join(parts)))
    return found


def page(today: datetime.date) -> str:
    lines = ["# Licences of what isomorph installs", ""]
    lines += [f"isomorph: Apache-2.0. The rest as the packages themselves state it, {today}, `python .ci/licences.py`."]
    lines += ["`base`: installed always, or needed by such a package.", ""]
    lines += ["| package | version | licence | needed by |", "| --- | --- | --- | --- |"]
    lines += [f"| {' | '.join(row)} |" for row in rows()]
    lines += ["", "In the compiled module:", "", "| part | licence |", "| --- | --- |"]
    return "\n".join([*lines, *(f"| {name} | {licence} |" for name, licence in ADDED.items()), ""])


if __name__ == "__main__":
    PAGE.write_text(page(datetime.date.today()), encoding="utf-8")
    print(f"{PAGE.relative_to(ROOT)}: {len(rows())} packages")
