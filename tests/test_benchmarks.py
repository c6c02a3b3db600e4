"""The benchmarks: what is wrong gets no speed, what is absent is listed, the README says what was measured.

No timing is tested.
"""

import ast
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

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


def test_readme_and_full_tables_agree_with_the_results() -> None:
    table = load("table")
    readme = (ROOT / "README.md").read_text()
    assert readme == table.between(readme, "benchmarks", table.section()), "run python benchmarks/table.py"
    page = (ROOT / "kernels" / "README.md").read_text()
    assert page == table.with_rows(page), "run python benchmarks/table.py"
    assert (BENCHMARKS / "RESULTS.md").read_text() == table.full(), "run python benchmarks/table.py"


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


def test_zeros_are_wrong_however_far_off_eager_is() -> None:
    compare = load("compare")
    right = torch.arange(1.0, 101.0, device=compare.DEVICE)
    spoilt = right.clone()
    spoilt[-1] *= 0.6  # error 0.4 of the largest value: 16 times that allows anything; its norm is 0.07 of all
    providers = {
        compare.OURS: lambda: lambda: (spoilt,),
        compare.EAGER: lambda: lambda: (spoilt,),
        "zeros": lambda: lambda: (right * 0,),
    }
    case = compare.Case("op", "100", torch.float32, providers, lambda: (right.double(),))
    rows = {row["provider"]: row for row in compare.measure(case, max_rounds=3, budget_s=0.1)}
    assert {name: row["status"] for name, row in rows.items()} == {
        compare.OURS: "ok",
        compare.EAGER: "ok",
        "zeros": "wrong",
    }
    assert rows[compare.EAGER]["norm_error"] == pytest.approx(40 / sum(i * i for i in range(1, 101)) ** 0.5)


def rows_of_a_case(**medians: float) -> list[dict[str, Any]]:
    case = {"op": "o", "size": "s", "dtype": "float32", "machine": "m", "threads": 1, "torch": "t", "date": "d"}
    ok = {"status": "ok", "p20_s": 0.001, "p80_s": 0.001, "memory_mib": None, "error": 0.0}
    ours = medians["isomorph"]
    return [{**case, **ok, "provider": p, "median_s": s, "ratio": s / ours} for p, s in medians.items()]


def test_latest_row_counts(tmp_path: Path) -> None:
    table = load("table")
    rows = rows_of_a_case(isomorph=0.001) + rows_of_a_case(isomorph=0.002)
    (tmp_path / "kernels.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    text = table.full(tmp_path)
    assert "| 2.00 " in text and "| 1.00 ms" not in text and "| 1.00 |" not in text


def test_tables_name_the_best_peer_and_put_the_fastest_first(tmp_path: Path) -> None:
    table = load("table")
    rows = rows_of_a_case(**{"isomorph": 0.002, "torch eager": 0.01, "slow peer": 0.008, "fast peer": 0.001})
    gone = {**rows[0], "provider": "gone", "status": "absent", "reason": "not installed"}
    del gone["median_s"], gone["ratio"]
    (tmp_path / "kernels.jsonl").write_text("".join(json.dumps(r) + "\n" for r in [gone, *rows]))
    assert "| 5.00 | absent | fast peer: 0.50 |" in table.full(tmp_path)
    page = table.with_rows("before\n<!-- bench:o -->\nold\n<!-- /bench -->\nafter", tmp_path)
    assert "o -->\nMeasured (m): s, float32: 2.00 ms, torch eager 5.00 times as long, fast peer 0.50" in page
    assert page.startswith("before\n") and page.endswith("<!-- /bench -->\nafter") and "old" not in page
    order = [line.split(" | ")[2] for line in table.full(tmp_path).splitlines() if line.startswith("| s |")]
    assert order == ["fast peer", "isomorph", "slow peer", "torch eager", "gone"]


def test_a_step_is_summed_up_without_its_first_turn_and_reaches_the_pages(tmp_path: Path) -> None:
    step, table = load("bench_step"), load("table")
    args = step.parse_args(["--model", "/some/where/SmolLM2-135M", "--steps", "3", "--device", "cpu", "--kl", "0.01"])
    turn = {
        "generate_s": 1.0,
        "judge_s": 0.5,
        "completion_tok": 30,
        "all_tok": 90,
        "peak_mib": 7.0,
        "padding_share": 0.25,
    }
    rows = [
        {"who": who, "turn": i, **turn, "step_s": seconds, "update_s": seconds - 1.5}
        for who, times in (("trl", (900.0, 8.0, 10.0)), ("isomorph", (900.0, 2.0, 4.0)))
        for i, seconds in enumerate(times)
    ]
    summary = step.summarized(rows, args)
    assert summary["ratio"] == 3.0 and summary["trl"]["step_s"] == 9.0 and "/some/where" not in summary["command"]
    liger = {**summary, "trl_liger": True, "ratio": 1.0, "ratios": [1.0]}
    (tmp_path / "step.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (summary, liger)))
    lines = [line.split(" | ")[1:3] for line in table.section(tmp_path).splitlines() if "GRPO step" in line]
    name = "TRL's GRPOTrainer, generating by transformers"
    assert lines == [[name, "3.25 (2.50 to 4.00)"], [f"{name}, with Liger's layers", "1.00 (1.00 to 1.00)"]]
    assert summary["isomorph"]["completion_tok_s"] == (30 / 2 + 30 / 4) / 2
    (tmp_path / "step.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, summary]))
    assert "| 3.25 (2.50 to 4.00) | not measured | 1.00 | - |" in table.section(tmp_path)
    text = table.full(tmp_path)
    assert "SmolLM2-135M, sampler builtin, KL 0.01, 4 prompts of 8 completions" in text
    assert "| float32 | TRL | **3.2** (2.5 to 4.0) | 3.00 | 0.33 | 2.67 |" in text and "| 25 % |" in text
    assert f"```\n{summary['command']}\n```" in text


def test_of_a_processor_the_tables_say_no_seconds_and_no_rates(tmp_path: Path) -> None:
    table = load("table")
    rows = rows_of_a_case(**{"isomorph": 0.002, "torch eager": 0.01})
    for machine, says_ms in (("x86_64, 2 cores, AVX512", False), ("NVIDIA H100", True)):
        here = [{**row, "machine": machine, "p20_s": 0.5 * row["median_s"], "gb_s": 7.0} for row in rows]
        (tmp_path / "kernels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in here))
        pages = [
            table.full(tmp_path),
            table.with_rows("<!-- bench:o -->\n<!-- /bench -->", tmp_path),
        ]
        assert ["2.00 ms" in pages[0], "GB/s" in pages[0], "2.00 ms" in pages[1]] == [says_ms] * 3
        assert "| 5.00 (2.50 to " in pages[0] and "eager 5.00 times" in pages[1]


def test_the_readmes_table_marks_where_the_other_is_better_and_links_to_its_command(tmp_path: Path) -> None:
    table = load("table")
    times = {"isomorph": 0.002, "torch eager": 0.01, "fast peer": 0.001}
    rows = [{**row, "op": "linear_loss", "memory_mib": 1e3 * row["median_s"]} for row in rows_of_a_case(**times)]
    (tmp_path / "kernels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (line,) = [line for line in table.section(tmp_path).splitlines() if line.startswith("| op ")]
    assert line.split(" | ")[1:6] == ["fast peer", "**0.50** (0.50 to 0.50)", "not measured", "**0.50**", "-"]
    (anchor,) = re.findall(r"benchmarks/RESULTS\.md#([\w-]+)\)", line)
    titles = re.findall(r"^#+ (.*)$", table.full(tmp_path), re.MULTILINE)
    assert anchor in {table.anchor(title) for title in titles}


@pytest.mark.parametrize(
    "options", [["--trl-liger"], ["--trl-generation", "vllm"], ["--group", "3", "--prompts", "3"]], ids=" ".join
)
def test_a_step_that_cannot_be_taken_is_refused_before_it_starts(options: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        load("bench_step").parse_args(["--model", "x", "--device", "cpu", *options])
    assert stopped.value.code == 2


@pytest.mark.parametrize("name", [None, "SmolLM2-135M's shape"])
@pytest.mark.parametrize("more", [[], ["--trl-liger", "--kl", "0.01", "--sampler", "vllm"]], ids=["plain", "options"])
def test_the_command_of_a_step_takes_every_option_that_the_run_took(name: str | None, more: list[str]) -> None:
    step = load("bench_step")
    given = ["--model", "FOLDER", *(["--name", name] if name else []), "--micro-batch-tok", "16384", "--device", "cuda"]
    args = step.parse_args([*given, "--steps", "4", "--max-new-tok", "256", "--dtype", "bfloat16", *more])
    python, script, *options = shlex.split(step._command(args))
    assert (python, script) == ("python", "benchmarks/bench_step.py") and step.parse_args(options) == args


PEERS = ("trl", "liger_kernel", "cut_cross_entropy")


@pytest.mark.slow
@pytest.mark.skipif(any(importlib.util.find_spec(m) is None for m in PEERS), reason="needs the extra [bench]")
def test_every_peer_that_runs_here_is_called_right(tmp_path: Path) -> None:
    """On two cores nothing is wrong or failed in float32, and who is absent needs a GPU or another package."""
    script = """
import sys, torch
sys.path.insert(0, sys.argv[1])
import bench_linear_logprob, bench_linear_loss, bench_token_logprob
from compare import measure
small = (8, 16, 300, torch.float32)
cases = [bench_linear_loss._case(*small), bench_linear_loss._cross_entropy(*small), bench_linear_logprob._case(*small),
         bench_token_logprob._case(8, 300, torch.float32)]
for case in cases:
    for row in measure(case, max_rounds=1, budget_s=0.1):
        print(row["op"], row["provider"], row["status"], row.get("reason", ""), sep="|")
"""
    command = [sys.executable, "-c", script, str(BENCHMARKS)]
    done = subprocess.run(command, check=True, timeout=300, capture_output=True, text=True)
    rows = [line.split("|") for line in done.stdout.splitlines()]
    assert [row for row in rows if row[2] not in ("ok", "absent")] == []
    absent = {row[1]: row[3] for row in rows if row[2] == "absent"}
    assert all("needs a GPU" in why or "not installed" in why for why in absent.values()), absent
    found = {row[1] for row in rows if row[2] == "ok"}
    assert {"trl ChunkedLogProbFunction", "liger LigerFusedLinearGRPOLoss", "torch.compile"} <= found


@pytest.mark.slow
def test_one_op_through_the_script(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    command = [sys.executable, str(BENCHMARKS / "all_ops.py"), "--quick", "--op", "packing", "--out", str(out)]
    subprocess.run(command, check=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"})
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert {"isomorph", "torch eager"} <= {row["provider"] for row in rows if row["status"] == "ok"}


def test_missing_benchmarks_are_an_input_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from isomorph.curriculum.commands import kernels
    from isomorph.engine.config import UserError

    monkeypatch.setattr(kernels, "__file__", str(tmp_path / "curriculum" / "commands" / "kernels.py"))
    monkeypatch.setattr(kernels.subprocess, "run", lambda *command, **options: pytest.fail("a benchmark was started"))
    with pytest.raises(UserError, match="not part of the installed package"):
        kernels.bench_kernels(None, None, quick=True)


@pytest.mark.parametrize("path", sorted(BENCHMARKS.glob("*.py")), ids=lambda path: path.stem)
def test_a_script_reads_no_option_that_it_does_not_have(path: Path) -> None:
    tree = ast.parse(path.read_text())
    of_args = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "args"
    ]
    written = {node.attr for node in of_args if isinstance(node.ctx, ast.Store)}
    read = {node.attr for node in of_args} - written
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    names = {
        str(argument.value).lstrip("-").replace("-", "_")
        for call in calls
        if isinstance(call.func, ast.Attribute) and call.func.attr == "add_argument"
        for argument in call.args
        if isinstance(argument, ast.Constant)
    }
    assert not names or read <= names
