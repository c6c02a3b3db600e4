"""benchmarks/curriculum_gpu.py: its study files, its rows after real runs of a tiny model, its table."""

import json
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def _benchmarks_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.mark.parametrize("model", ["tiny", "/a/model"])
@pytest.mark.parametrize("sampler", ["builtin", "vllm"])
def test_all_recipes_are_right_and_the_claim_comes_first(model: str, sampler: str, tmp_path: Path) -> None:
    from curriculum_design import shared_recipe, size_of, study_file
    from curriculum_gpu import CLAIM, OTHERS, SEEDS, runs_of

    from isomorph.curriculum.study.design import Design

    size = size_of(model, rehearse=False)
    shared = shared_recipe(size, model=model, dtype="bfloat16", sampler=sampler, memory_frac=0.2)
    (tmp_path / "shared.toml").write_text(shared)
    (tmp_path / "STUDY.toml").write_text(study_file(size, threads=1))
    design = Design(tmp_path / "STUDY.toml")  # refuses a wrong recipe, and conditions of unequal length
    runs = [run.condition for run in runs_of(design, CLAIM + OTHERS, SEEDS)]
    assert Counter(runs[:9]) == {"warm": 3, "words": 3, "graph_words": 3} and set(runs[9:]) == {*OTHERS}
    recipe = design.run("graph_words", 2).recipe
    assert (recipe.model.dtype, recipe.sampler.kind) == ("bfloat16", sampler)
    assert [stage.steps for stage in recipe.stage] == [size.graph_steps, size.steps - size.graph_steps]


def test_the_tiny_models_runs_are_those_of_the_committed_study(tmp_path: Path) -> None:
    """Lengths that are too short for the demonstrations would cut off right answers."""
    from curriculum_design import shared_recipe, size_of, study_file

    from isomorph.curriculum.study.design import Design

    size = size_of("tiny", rehearse=False)
    shared = shared_recipe(size, model="tiny", dtype="float32", sampler="builtin", memory_frac=0.2)
    (tmp_path / "shared.toml").write_text(shared)
    (tmp_path / "STUDY.toml").write_text(study_file(size, threads=1))
    ours = Design(tmp_path / "STUDY.toml")
    studies = BENCHMARKS.parent / "studies"
    theirs = Design(studies / "carry_over" / "STUDY.toml")
    first = Design(studies / "demonstrations" / "STUDY.toml").run("mixed", 11).recipe
    run, warm = ours.run("graph_words", 11).recipe, ours.warm_run(11).recipe
    assert run.data == theirs.run("words", 11).recipe.data == first.data and warm.model.tiny == first.model.tiny
    for stages, committed in (
        (run.stage, theirs.run("graph20_words40", 11).recipe.stage),
        (warm.stage, (*first.stage, *theirs.warm_run(11).recipe.stage)),
    ):
        for stage, other in zip(stages, committed, strict=True):
            assert (stage.steps, stage.mixture) == (other.steps, other.mixture)
            assert (stage.sampling, stage.batch.prompts) == (other.sampling, other.batch.prompts)
            assert (stage.objective, stage.optim.lr) == (other.objective, other.optim.lr)


def exam(condition: str, seed: int, step: int, right: str, identity: str = "new") -> dict[str, Any]:
    machine = {"device": "cuda", "device_name": "a GPU", "dtype": "bfloat16", "sampler": "builtin"}
    asked = {"of_steps": 4, "right": {"natural": right}, "items": {"natural": "the same"}, "versions": {"torch": "2"}}
    return {"kind": "exam", "condition": condition, "seed": seed, "step": step, "identity": identity} | machine | asked


def test_the_table_pairs_by_seed_and_item_and_counts_the_newest_run() -> None:
    from curriculum_report import report

    settings = {"model": "tiny", "rehearse": False}
    rows = [{"kind": "call", "settings": settings}, {"kind": "shortcuts", "rates": {"natural": {"a": 0.25, "b": 0.5}}}]
    rows += [exam("warm", 1, 2, "1111"), exam("warm", 1, 4, "1000"), exam("warm", 2, 2, "1111")]  # two in the middle
    rows += [exam("words", 1, 4, "1111", identity="of another recipe"), exam("words", 1, 2, "0000")]
    rows += [exam("words", 1, 4, "1000"), exam("words", 2, 4, "1100")]
    rows += [exam("graph_words", 1, 4, "1100"), exam("graph_words", 2, 4, "1110"), exam("graph_words", 3, 4, "1111")]
    text = "\n".join(report(rows))
    assert "| warm | 25.0% (1) |  |  |" in text
    assert "| words |  | 0.0% (1) | 37.5% (2) |" in text  # (1/4 + 2/4) / 2
    assert "| graph_words |  |  | 75.0% (3) |" in text
    # differences +1/4 and +1/4 over the two seeds that both have; no third pair
    assert "| graph_words | 4 | +25.0 [" in text and "| 2 of 2 | t |" in text
    assert "| natural | 25.0% | 50.0% | b |" in text


@pytest.mark.slow
def test_real_runs_leave_a_row_after_every_exam_and_are_not_repeated(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import curriculum_gpu

    call = ["--out", str(tmp_path), "--rehearse", "--device", "cpu", "--only", "words", "graph_words", "--seeds", "1"]
    script = str(BENCHMARKS / "curriculum_gpu.py")
    done = subprocess.run([sys.executable, "-P", script, *call], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    file = tmp_path / "curriculum_gpu.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    exams = {(row["condition"], row["step"]): row for row in rows if row["kind"] == "exam"}
    expected = [("warm", 6), *((name, step) for name in ("words", "graph_words") for step in (0, 2, 4, 6))]
    assert {*exams} == {*expected, ("warm", 4)} and len(exams) == sum(row["kind"] == "exam" for row in rows)
    assert exams["words", 0]["right"] == exams["graph_words", 0]["right"] == exams["warm", 6]["right"]
    last = exams["words", 6]
    assert {form: len(right) for form, right in last["right"].items()} == {"natural": 12, "graph": 12}
    assert (last["device"], last["dtype"], last["sampler"]) == ("cpu", "float32", "builtin")
    assert last["response_tok"] > exams["words", 2]["response_tok"] > 0 and "torch" in last["versions"]
    assert {row["status"] for row in rows if row["kind"] == "run"} == {"done"}
    assert max(rate for row in rows if row["kind"] == "shortcuts" for rate in row["rates"]["natural"].values()) > 0
    file.write_text(file.read_text() + '{"kind": "ex')  # a kill in the middle of a row
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(curriculum_gpu, "age_s", lambda: 1e6)  # of this process: a call has a limit of its own
    try:
        assert curriculum_gpu.main(call) == 0
        assert curriculum_gpu.main(call, spent_s=600) == 2 and "raise --limit-s" in capfd.readouterr().err
    finally:
        signal.signal(signal.SIGTERM, before)
    again = [json.loads(line) for line in file.read_text().splitlines()]
    assert again[:-2] == rows and {row["kind"] for row in again[-2:]} == {"call"}, "the later calls find it all done"
    assert curriculum_gpu.main(["--report", str(tmp_path)]) == 0 and "| graph_words |" in capfd.readouterr().out
    assert curriculum_gpu.main([*call, "--dtype", "bfloat16"]) == 2 and "another --out" in capfd.readouterr().err
