"""The command line as a user meets it: a whole run, a killed one that goes on, and every kind of bad input."""

import importlib.metadata
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from processes import step_rows, wait_for
from rich.console import Console

from isomorph.curriculum import cli
from isomorph.curriculum.commands.train import AGAIN_S, Stop, new_folder
from isomorph.engine.config import UserError
from isomorph.kernels import backend

Command = Callable[..., subprocess.CompletedProcess[str]]
RECIPES = Path(__file__).parents[1] / "curriculum" / "recipes"
SMOKE = RECIPES / "smoke.toml"
ISOMORPH = [sys.executable, "-c", "from isomorph.curriculum.cli import main; main()"]
# 12 supervised steps are as good as 80 here, where nothing has to be learned; a checkpoint ends the second stage
SHORT = ("stage.0.steps=12", "run.checkpoint_every=8")
TRAIN = [*ISOMORPH, "train", str(SMOKE), *SHORT]
UNTIMED = ("time/", "wall_s", "mem/", "gpu/", "energy/", "publish/probe_s", "publish/fingerprint_s", "publish/move_s")


def isomorph(
    *arguments: str | Path, cwd: Path, program: Sequence[str] = ISOMORPH, **environment: str
) -> subprocess.CompletedProcess[str]:
    command = [*program, *map(str, arguments)]
    env = {**os.environ, **environment}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def warm(warm_isomorph: list[str]) -> Command:
    """``isomorph``, where the test is about what the command does and not how it starts."""
    return partial(isomorph, program=warm_isomorph)


def error_line(done: subprocess.CompletedProcess[str]) -> str:
    """The one line that a user gets for a wrong input."""
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    return lines[0]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    done = isomorph("train", SMOKE, "--run", "whole", *SHORT, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "sequential baseline" in done.stdout
    return folder / "whole"


def test_a_run_leaves_what_it_promises(whole_run: Path) -> None:
    summary = json.loads((whole_run / "summary.json").read_text())
    assert summary["status"] == "done" and summary["steps"] == 20
    assert set(summary["accuracy"]) == {"before", "after"}
    assert set(summary["accuracy"]["after"]) == {"natural", "graph", "code", "table"}
    assert [stage["name"] for stage in summary["stages"]] == ["warm-up", "symbols", "words"]
    assert summary["judge"] == {"timeouts": 0, "crashes": 0, "errors": 0}
    assert len(summary["weights_sha256"]) == 64 and summary["wall_s"] > 0
    described = json.loads((whole_run / "run.json").read_text())
    assert described["recipe"]["stage"][2]["objective"]["clip_high"] == 0.28  # resolved, presets filled in
    assert described["versions"]["torch"] and described["backends"]["packed_attention"]
    assert [row["step"] for row in step_rows(whole_run, UNTIMED)] == list(range(1, 21))
    assert (whole_run / "report" / "report.html").is_file()
    assert list((whole_run / "completions").glob("step-*.jsonl"))


def test_the_saved_model_loads_in_transformers(whole_run: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(whole_run / "model")
    model = AutoModelForCausalLM.from_pretrained(whole_run / "model")
    with torch.no_grad():
        logits = model(**tokenizer("Step 1", return_tensors="pt", return_token_type_ids=False)).logits
    assert logits.shape[-1] == len(tokenizer) and logits.isfinite().all()


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_for_bit(whole_run: Path, tmp_path: Path, warm: Command) -> None:
    run = tmp_path / "killed"
    process = subprocess.Popen(
        [*TRAIN, "--run", str(run)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    steps = run / "steps.jsonl"
    # two steps after a checkpoint, which ends the stage with a reference policy and two updates a step
    wait_for(lambda: steps.is_file() and len(steps.read_text().splitlines()) >= 18, process, seconds=300)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (run / "summary.json").exists()

    resumed = warm("train", "--resume", run, cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert step_rows(run, UNTIMED) == step_rows(whole_run, UNTIMED)
    one, other = (json.loads((folder / "summary.json").read_text()) for folder in (run, whole_run))
    assert one["weights_sha256"] == other["weights_sha256"]
    assert one["exams"] == other["exams"] and one["tokens"] == other["tokens"]
    assert set(one["tokens"]) == {"prompt_tok", "response_tok", "forward_tok"}


@pytest.mark.slow
def test_an_interrupted_run_writes_a_checkpoint_and_goes_on(whole_run: Path, tmp_path: Path, warm: Command) -> None:
    run = tmp_path / "interrupted"
    process = subprocess.Popen(
        [*TRAIN, "--run", str(run)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    steps = run / "steps.jsonl"
    wait_for(lambda: steps.is_file() and len(steps.read_text().splitlines()) >= 14, process, seconds=300)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "--resume" in out
    last = len(steps.read_text().splitlines())
    assert (run / "checkpoints" / f"step-{last:08d}").is_dir()
    assert json.loads((run / "summary.json").read_text())["status"] == "interrupted"

    assert warm("train", "--resume", run, cwd=tmp_path).returncode == 0
    one, other = (json.loads((folder / "summary.json").read_text()) for folder in (run, whole_run))
    assert one["weights_sha256"] == other["weights_sha256"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_stops_a_run_while_responses_are_sampled(tmp_path: Path, number: signal.Signals) -> None:
    """A step whose responses take minutes: what is drawn is dropped, the step's beginning is kept."""
    long = (
        "model.tiny.max_model_len=8192",
        "stage.0.sampling.max_new_tok=8000",
        "stage.0.sampling.samples_per_prompt=64",
    )
    tables = (*long, "stage.0.batch.micro_batch_tok=16384", "stage.0.objective.name=dapo", "stage.0.batch.prompts=16")
    process = subprocess.Popen(
        [*ISOMORPH, "train", str(SMOKE), "--run", "run", *tables, "eval.prompts=1", "eval.max_new_tok=1"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        while "eval after start" not in (line := process.stdout.readline()):
            assert line, process.communicate()
        time.sleep(1.0)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert f"{number.name}: stop requested" in out and "--resume" in out
    assert (tmp_path / "run" / "checkpoints" / "step-00000000").is_dir()


def test_a_signal_before_the_first_poll_ends_the_process_at_once() -> None:
    stop = Stop(Console(file=io.StringIO(), quiet=True))
    with pytest.raises(KeyboardInterrupt):
        stop.take(signal.SIGTERM, None)
    assert not stop.requested()
    for _ in range(3):  # as a launcher repeats it
        stop.take(signal.SIGTERM, None)
        stop.take(signal.SIGINT, None)
    assert stop.requested() and stop.first is not None
    stop.first -= 2 * AGAIN_S
    stop.take(signal.SIGUSR1, None)
    with pytest.raises(KeyboardInterrupt):
        stop.take(signal.SIGINT, None)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("run.sede=1", "did you mean 'seed'"),
        ("stage.0.optim.learning_rate=1", "unknown key"),
        ("stage.1.sampling.samples_per_prompt=1", "samples_per_prompt must be >= 2"),
        ("stage.1.sampling.temperature=0", "greater than 0"),
        ("sampling.top_k=1", "top_k = 1 leaves a single token to draw"),
        ("stage.1.objective.name=ppo", "'grpo'"),
        ("eval.data=nothing", "no [data.nothing]"),
        ("stage.9.steps=1", "must be a stage's number, 0 to 2"),
        ("stage.1.mixture=[{data='plans',representation='table'}]", "for evaluation only"),
        ("model.path=somewhere", "exactly one of model.path and model.tiny"),
        ("stage.0.sampling.max_new_tok=10", "a demonstration of"),
        ("stage.1.sampling.max_new_tok=250", "positions for 256"),
        ("stage.2.sampling.max_new_tok=256", "stage words: sampling.max_new_tok must leave positions for a prompt"),
        ("stage.1.batch.micro_batch_tok=60", "batch.micro_batch_tok=60"),
    ],
)
def test_a_wrong_value_is_refused_in_one_line(override: str, expected: str, tmp_path: Path, warm: Command) -> None:
    quick = ("stage.0.steps=1",)
    assert expected in error_line(warm("train", SMOKE, *quick, override, "--run", "x", cwd=tmp_path))


def test_a_run_starts_from_a_source_tree_that_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As benchmarks/gpu_suite.py starts them on a machine that lends only a folder."""
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name == "isomorph":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(sys, "argv", ["isomorph", "train", "missing.toml"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2 and "isomorph from a source tree" in capsys.readouterr().out


def test_a_file_of_tasks_is_not_replaced_unasked(tmp_path: Path, warm: Command) -> None:
    make = ("data", "make", "--representation", "graph", "--prompts", "1", "--out", "tasks.jsonl")
    assert warm(*make, cwd=tmp_path).returncode == 0
    assert "--force" in error_line(warm(*make, cwd=tmp_path))
    assert warm(*make, "--force", cwd=tmp_path).returncode == 0


def test_a_run_appears_in_a_report_once(tmp_path: Path, warm: Command) -> None:
    assert "twice" in error_line(warm("report", "run", "./run", cwd=tmp_path))


def test_a_reader_that_goes_away_gets_no_traceback(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [*ISOMORPH, "plan", str(SMOKE), "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.wait(timeout=120) == 1
    assert process.stderr.read() == ""


def test_a_missing_recipe_is_refused(tmp_path: Path) -> None:
    assert "no such file; the recipe must be" in error_line(isomorph("train", "nowhere.toml", cwd=tmp_path))


def test_an_unknown_option_is_refused(tmp_path: Path, warm: Command) -> None:
    assert "No such option" in error_line(warm("train", SMOKE, "--folder", "x", cwd=tmp_path))


def test_a_used_run_folder_is_not_overwritten(whole_run: Path, warm: Command) -> None:
    before = (whole_run / "steps.jsonl").read_bytes()
    assert "is not empty" in error_line(warm("train", SMOKE, "--run", whole_run, cwd=whole_run.parent))
    assert (whole_run / "steps.jsonl").read_bytes() == before


def test_resuming_what_is_no_run_is_refused(tmp_path: Path, warm: Command) -> None:
    assert "must be the folder of a run" in error_line(warm("train", "--resume", tmp_path, cwd=tmp_path))


def test_a_start_that_is_refused_leaves_no_folder(tmp_path: Path, warm: Command) -> None:
    message = error_line(warm("train", SMOKE, "parallel.kind=fsdp", "--run", "refused", cwd=tmp_path))
    assert "torchrun" in message
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize("request_", ["gea=reference", "foo", "triton"])
def test_a_wrong_choice_of_implementations_is_refused_before_anything_is_made(
    tmp_path: Path, request_: str, warm: Command
) -> None:
    if request_ == "triton" and torch.cuda.is_available():
        pytest.skip("a GPU has these bodies")
    run = isomorph if request_ == "triton" else warm  # Triton reads TRITON_INTERPRET when it is imported
    for command in (("train", SMOKE, "--run", "refused"), ("eval", "refused")):
        done = run(*command, cwd=tmp_path, ISOMORPH_BACKEND=request_, TRITON_INTERPRET="0")
        assert "ISOMORPH_BACKEND" in error_line(done)
    assert not (tmp_path / "refused").exists()


def test_a_wrong_instruction_set_is_refused_before_anything_is_made(tmp_path: Path, warm: Command) -> None:
    if not backend.native_available():
        pytest.skip(backend.native_reason())
    message = error_line(warm("train", SMOKE, "--run", "refused", cwd=tmp_path, ISOMORPH_ISA="avx1024"))
    assert "ISOMORPH_ISA is avx1024" in message and "baseline" in message
    assert not (tmp_path / "refused").exists()


def test_two_runs_of_one_second_have_a_folder_each(tmp_path: Path) -> None:
    first, second = (new_folder(tmp_path / "smoke-1", is_named=False) for _ in range(2))
    assert first == tmp_path / "smoke-1" and second != first and second.is_dir()
    with pytest.raises(UserError, match="is not empty"):
        (first / "run.json").touch()
        new_folder(first, is_named=True)
    with pytest.raises(UserError, match="is a file"):
        new_folder(first / "run.json", is_named=True)


def test_version_is_printed_and_no_command_prints_the_help(tmp_path: Path) -> None:
    assert isomorph("--version", cwd=tmp_path).stdout.startswith("isomorph 0.")
    bare = isomorph(cwd=tmp_path)
    assert bare.returncode == 2 and "train" in bare.stdout + bare.stderr and "error:" not in bare.stderr


def recipe_for_files(folder: Path, rows: str, model: str) -> Path:
    (folder / "graph.jsonl").write_text(rows)
    recipe = folder / "files.toml"
    recipe.write_text(
        f'[model]\npath = "{model}"\n'
        '[data.rows]\nkind = "jsonl"\nfamily = "async_plan"\nfiles = { graph = "$ROWS/graph.jsonl" }\n'
        '[[stage]]\nname = "only"\nsteps = 1\nmixture = [{ data = "rows", representation = "graph" }]\n'
        '[eval]\ndata = "rows"\nrepresentations = ["graph"]\n'
    )
    return recipe


def test_an_unreadable_model_folder_is_refused(tmp_path: Path, warm: Command) -> None:
    recipe = recipe_for_files(tmp_path, "", str(tmp_path / "model"))
    rows = {"ROWS": str(tmp_path)}
    assert "must be a folder with a config.json" in error_line(warm("train", recipe, cwd=tmp_path, **rows))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    assert "tokenizer" in error_line(warm("train", recipe, cwd=tmp_path, **rows))


def test_a_broken_row_is_named_by_file_and_line(whole_run: Path, tmp_path: Path, warm: Command) -> None:
    good = warm("data", "make", "--representation", "graph", "--prompts", "1", cwd=tmp_path)
    assert good.returncode == 0, good.stderr
    recipe = recipe_for_files(tmp_path, good.stdout + '{"question": "q"\n', str(whole_run / "model"))
    message = error_line(warm("train", recipe, cwd=tmp_path, ROWS=str(tmp_path)))
    assert "graph.jsonl, line 2" in message
    assert "environment variable" in error_line(warm("train", recipe, cwd=tmp_path))


def test_a_full_disk_ends_the_run_with_code_1_and_keeps_the_earlier_checkpoint(tmp_path: Path, warm: Command) -> None:
    """A limit on the size of a file stands for the full disk: it comes up in the middle of writing, as there."""
    limited = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "from isomorph.engine.record import checkpoint; save = checkpoint.save_checkpoint\n"
        "def tight(root, state, *a, **k):\n"
        "    if state.step == 16: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "    return save(root, state, *a, **k)\n"
        "from isomorph.engine import loop; loop.save_checkpoint = tight\n"
        "from isomorph.curriculum.cli import main; main()"
    )
    command = [sys.executable, "-c", limited, "train", str(SMOKE), "--run", "full", *SHORT]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stderr
    assert "could not be written" in done.stderr and "step-00000008" in done.stderr
    assert "Traceback" not in done.stderr
    left = {path.name for path in (tmp_path / "full" / "checkpoints").iterdir()}
    assert left == {"step-00000008", "stage-warm-up"}
    resumed = warm("train", "--resume", tmp_path / "full", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
