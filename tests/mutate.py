"""Mutation testing: small faults, planted one at a time where a silent one costs most. Which does no test see?

    pip install cosmic-ray==8.7.0
    python tests/mutate.py --count 40                      40 mutants of each file below
    python tests/mutate.py --count 40 --file objective     of one file only
    python tests/mutate.py --table                         the table of the rows that there are

cosmic-ray makes the mutants (another comparison, operator, number, a loop that never runs, a dropped `not` ...).
Places are drawn by a seed, one mutant a place; those in annotations and `__all__` are left out. A mutant is killed
when one of the file's tests fails or does not end in time. The package is installed from this checkout into a virtual
environment of its own, which also sees the packages of the calling one, and is mutated there: the checkout stays as
it is.

Rows go to benchmarks/results/mutants.jsonl, one a mutant; one that is there already for this commit is not tried again.
A survivor is either equivalent to the original or a missing test: mutants_alive.json says which, by file and line.
"""

import argparse
import ast
import json
import os
import random
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ROWS = ROOT / "benchmarks" / "results" / "mutants.jsonl"
REASONS = ROOT / "tests" / "mutants_alive.json"
# file -> its tests, tests/engine/test_NAME.py or tests/curriculum/test_NAME.py; what finds most comes first
FILES: dict[str, tuple[str, ...]] = {
    "engine/update/advantage.py": ("objective", "trl_losses", "learner"),
    "engine/update/objective.py": ("objective", "trl_losses", "reward_kl", "learner"),
    "engine/update/micro_batches.py": ("micro_batches", "policy", "turns", "learner"),
    "engine/packed_batch.py": ("micro_batches", "policy", "turns", "learner", "trl_adapter"),
    "engine/update/score.py": ("score", "score_parts", "learner"),
    "engine/update/learner.py": ("learner", "planted", "not_finite", "host_gradients", "optimizer", "loop"),
    "engine/update/optimizer.py": ("optimizer", "learner"),
    "curriculum/rewards/duration.py": ("duration", "rewards", "hostile_responses"),
    "curriculum/rewards/builtin.py": ("rewards", "rewards_run", "families"),
    "curriculum/rewards/answer.py": ("rewards", "duration", "mathematics"),
    "curriculum/rewards/quantity.py": ("rewards", "mathematics", "families"),
    "curriculum/rewards/paper.py": ("paper_reward", "rewards"),
    "curriculum/stage.py": ("stage", "exits", "mixing", "effect", "resume"),
    "curriculum/exits.py": ("exits", "stage"),
    "curriculum/mixing.py": ("mixing", "stage", "conditions"),
}
DEADLINE_S = 600


@dataclass(frozen=True)
class Mutant:
    """One change. `line` and `column` are those of the original, from 1 and from 0."""

    file: str
    line: int
    column: int
    operator: str
    occurrence: int


def left_out(source: str) -> set[tuple[int, int]]:
    """Places (line, column) of annotations and of `__all__`: a change there changes nothing, or fails on import."""
    places: set[tuple[int, int]] = set()
    for node in ast.walk(ast.parse(source)):
        texts: list[ast.AST | None] = []
        if isinstance(node, ast.arg | ast.AnnAssign):
            texts = [node.annotation]
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            texts = [node.returns]
        elif isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
            texts = [node.value]
        for text in texts:
            if isinstance(text, ast.expr):
                assert text.end_lineno is not None and text.end_col_offset is not None
                for line in range(text.lineno, text.end_lineno + 1):
                    first = text.col_offset if line == text.lineno else 0
                    last = text.end_col_offset if line == text.end_lineno else 400
                    places.update((line, column) for column in range(first, last))
    return places


def mutants_of(file: str) -> Iterator[Mutant]:
    """Every mutant that cosmic-ray has for a file of this checkout, in its order."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.plugins import get_operator, operator_names

    source = (ROOT / file).read_text()
    tree, without = get_ast(source), left_out(source)
    for name in operator_names():
        operator = get_operator(name)
        if operator.arguments():  # those need the names of variables
            continue
        made = operator()
        places = [first for node in ast_nodes(tree) for first, _ in made.mutation_positions(node)]
        for occurrence, (line, column) in enumerate(places):
            if (line, column) not in without:
                yield Mutant(file, line, column, name.removeprefix("core/"), occurrence)


def drawn(file: str, count: int, seed: int) -> list[Mutant]:
    """`count` mutants at different places, one a place, the same for the same source and seed."""
    places: dict[tuple[int, int], list[Mutant]] = {}
    for mutant in mutants_of(file):
        places.setdefault((mutant.line, mutant.column), []).append(mutant)
    chance = random.Random(f"{file} {seed}")
    return [chance.choice(places[place]) for place in chance.sample(sorted(places), min(count, len(places)))]


def environment_of_its_own(folder: Path) -> tuple[Path, Path]:
    """A virtual environment with this checkout's package, plainly installed: its Python and the package's folder."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin" / "python"
    says = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(subprocess.run([python, "-c", says], check=True, capture_output=True, text=True).stdout.strip())
    (site / "of_the_caller.pth").write_text(sysconfig.get_path("purelib") + "\n")  # its .pth files are not read again
    subprocess.run([sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", ROOT], check=True)
    package = site / "isomorph"
    if not (package / "engine").is_dir():
        raise SystemExit(f"pip installed {ROOT}, but there is no {package}/engine.")
    return python, package


def test_command(python: Path, file: str) -> str:
    """Ends at the first test that fails. Names are relative to the checkout."""
    tests = (f"tests/{Path(file).parts[0]}/test_{name}.py" for name in FILES[file])
    return f"{python} -P -m pytest -x -q -p no:cacheprovider -p no:xdist --timeout {DEADLINE_S} {' '.join(tests)}"


def verdict(mutant: Mutant, python: Path, package: Path) -> dict[str, Any]:
    """Plant it, run the file's tests, take it out. A row for ROWS."""
    from cosmic_ray.mutating import mutate_and_test
    from cosmic_ray.work_item import MutationSpec

    spec = MutationSpec(
        module_path=package / mutant.file,
        operator_name=f"core/{mutant.operator}",
        occurrence=mutant.occurrence,
        start_pos=(mutant.line, mutant.column),
        end_pos=(mutant.line, mutant.column + 1),
    )
    begin = time.monotonic()
    found = mutate_and_test([spec], test_command(python, mutant.file), DEADLINE_S)
    if found.test_outcome is None or found.worker_outcome != "normal":
        raise RuntimeError(f"cosmic-ray could not plant {mutant}: {found.output}")
    changed = [line for line in (found.diff or "").splitlines() if line[:1] in "+-" and line[:3] not in ("+++", "---")]
    return {
        "file": mutant.file,
        "line": mutant.line,
        "column": mutant.column,
        "operator": mutant.operator,
        "was": next((line[1:].strip() for line in changed if line[0] == "-"), ""),
        "is": next((line[1:].strip() for line in changed if line[0] == "+"), ""),
        "outcome": "timeout" if found.output == "timeout" else found.test_outcome.value,
        "seconds": round(time.monotonic() - begin, 1),
    }


def rows_there() -> list[dict[str, Any]]:
    return [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.exists() else []


def table(rows: Sequence[dict[str, Any]], reasons: dict[str, str]) -> str:
    """Markdown: a line a file, then each survivor with its reason. The last verdict on a mutant counts."""
    last = {(row["file"], row["was"], row["is"], row["line"]): row for row in rows}.values()
    lines = ["| file | mutants | killed | alive | of these equivalent |", "| --- | --- | --- | --- | --- |"]
    for file in FILES:
        mine = [row for row in last if row["file"] == file]
        alive = [row for row in mine if row["outcome"] == "survived"]
        equal = sum(reasons.get(key(row), "").startswith("equivalent") for row in alive)
        if mine:
            lines.append(f"| {file} | {len(mine)} | {len(mine) - len(alive)} | {len(alive)} | {equal} |")
    lines.append("")
    for row in (row for row in last if row["outcome"] == "survived"):
        lines.append(f"- {row['file']}: `{row['was']}` -> `{row['is']}`: {reasons.get(key(row), 'NOT EXPLAINED')}")
    return "\n".join(lines)


def key(row: dict[str, Any]) -> str:
    """How REASONS names a mutant; line numbers move, lines do not."""
    return f"{row['file']}: {row['was']} -> {row['is']}"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=40, help="mutants a file")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--file", action="append", help="only files whose name holds this; may be repeated")
    parser.add_argument("--table", action="store_true", help="print the table and end")
    asked = parser.parse_args()
    if asked.table:
        print(table(rows_there(), json.loads(REASONS.read_text()) if REASONS.exists() else {}))
        return 0
    try:
        import cosmic_ray  # noqa: F401
    except ImportError:
        raise SystemExit("Mutants are made by cosmic-ray: pip install cosmic-ray==8.7.0") from None
    files = [file for file in FILES if not asked.file or any(part in file for part in asked.file)]
    if not files:
        raise SystemExit(f"--file {' '.join(asked.file)} is part of no name of: {', '.join(FILES)}.")
    head = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(head, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    there = {(r["file"], r["line"], r["column"], r["operator"], r["commit"]) for r in rows_there()}
    os.chdir(ROOT)  # names of test files are relative to it
    with tempfile.TemporaryDirectory() as folder:
        python, package = environment_of_its_own(Path(folder) / "env")
        alive = 0
        for file in files:
            begin = time.monotonic()
            if subprocess.run(test_command(python, file).split(), capture_output=True).returncode:
                raise SystemExit(f"The tests of {file} fail without a mutant: {test_command(python, file)}")
            print(f"{file}: its tests pass in {time.monotonic() - begin:.0f} s", flush=True)
            for mutant in drawn(file, asked.count, asked.seed):
                if (mutant.file, mutant.line, mutant.column, mutant.operator, commit) in there:
                    continue
                row = {"commit": commit, "seed": asked.seed} | verdict(mutant, python, package)
                with ROWS.open("a") as out:
                    out.write(json.dumps(row) + "\n")
                alive += row["outcome"] == "survived"
                change = f"{mutant.line}: {row['was']} -> {row['is']}"
                print(f"  {row['outcome']:8} {row['seconds']:6.1f} s  {change}", flush=True)
    print(f"{alive} alive")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
