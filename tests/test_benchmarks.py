"""The benchmarks: what is wrong gets no speed, what is absent is listed, the README says what was measured.

No timing is tested.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"bench_{name}", BENCHMARKS / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_readme_agrees_with_the_results() -> None:
    table = load("table")
    readme = (ROOT / "README.md").read_text()
    assert readme == table.replaced(readme, table.section()), "run python benchmarks/table.py"


def test_wrong_absent_and_failed_providers_get_no_speed() -> None:
    compare = load("compare")
    right = torch.arange(5.0, device=compare.DEVICE)

    def absent() -> None:
        raise compare.Absent("not installed")

    def failing() -> None:
        raise RuntimeError("no kernel")

    providers = {
        compare.OURS: lambda: lambda: (right,),
        compare.EAGER: lambda: lambda: (right,),
        "off": lambda: lambda: (right + 1,),
        "nan": lambda: lambda: (right * float("nan"),),
        "absent": absent,
        "failing": failing,
    }
    case = compare.Case("op", "5", torch.float32, providers, lambda: (right.double(),))
    rows = {row["provider"]: row for row in compare.measure(case, max_rounds=3, budget_s=0.1)}
    assert {name: row["status"] for name, row in rows.items()} == {
        compare.OURS: "ok",
        compare.EAGER: "ok",
        "off": "wrong",
        "nan": "wrong",
        "absent": "absent",
        "failing": "failed",
    }
    assert [name for name, row in rows.items() if "median_s" in row] == [compare.OURS, compare.EAGER]


def test_latest_row_counts(tmp_path: Path) -> None:
    table = load("table")
    row = {"op": "o", "size": "s", "dtype": "float32", "provider": "p", "machine": "m", "torch": "t", "date": "d"}
    row |= {"status": "ok", "median_s": 0.001, "p20_s": 0.001, "p80_s": 0.001, "memory_mib": None, "error": 0.0}
    rows = [row, row | {"median_s": 0.002}]
    (tmp_path / "kernels.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    text = table.section(tmp_path)
    assert "| 2.00 (" in text and "| 1.00 (" not in text


@pytest.mark.slow
def test_one_op_through_the_script(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    command = [sys.executable, str(BENCHMARKS / "all_ops.py"), "--quick", "--op", "packing", "--out", str(out)]
    subprocess.run(command, check=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"})
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert {"isomorph", "torch eager"} <= {row["provider"] for row in rows if row["status"] == "ok"}


def test_missing_benchmarks_are_an_input_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from isomorph.curriculum import cli
    from isomorph.engine.config import UserError

    monkeypatch.setattr(cli, "__file__", str(tmp_path / "curriculum" / "cli.py"))
    with pytest.raises(UserError, match="not part of the installed package"):
        cli.bench_kernels()


@pytest.mark.slow
def test_gpu_suite_rehearsal_runs_every_part(tmp_path: Path) -> None:
    suite = load("gpu_suite")
    command = [sys.executable, str(BENCHMARKS / "gpu_suite.py"), "--rehearse", "--out", str(tmp_path)]
    subprocess.run(command, check=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"})
    rows = [json.loads(line) for line in (tmp_path / "gpu_suite.jsonl").read_text().splitlines()]
    assert {row["part"]: row["ended"] for row in rows if "ended" in row} == dict.fromkeys(suite.PARTS, 0), rows
    assert {row["part"] for row in rows if "ended" not in row} == set(suite.PARTS)
