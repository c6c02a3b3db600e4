"""Every script of examples/ runs as a reader runs it, and does what it says."""

import difflib
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from isomorph.engine.config import ModelConfig, TinyModel
from isomorph.engine.model.load import load_policy

EXAMPLES = Path(__file__).parents[1] / "examples"
Output = Callable[..., str]
NUMBER = r"([-+]?\d+\.?\d*(?:e[-+]\d+)?)"


@pytest.fixture
def output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Output:
    """Runs a script in an empty folder and returns what it printed; in this process, which has imported torch."""

    def run(name: str, *arguments: str | Path) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        with torch.random.fork_rng(devices=[]):
            runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        printed = capsys.readouterr().out
        kept = (EXAMPLES / "output" / name).with_suffix(".txt").read_text(encoding="utf-8")
        assert without_numbers(printed) == without_numbers(kept), "run python .ci/gallery.py"
        return printed

    return run


def without_numbers(text: str) -> str:
    """What an example prints on any machine: processors change digits, and TRL's versions its lines of metrics."""
    lines = [line for line in text.splitlines() if not line.startswith("{")]
    return " ".join(re.sub(r"[-+]?\b\d[\d.]*(?:e[-+]?\d+)?", "#", "\n".join(lines)).split())


def numbers(label: str, text: str) -> list[float]:
    return [float(found) for found in re.findall(label + " " + NUMBER, text)]


def test_the_gallery_lists_every_example_with_what_it_printed() -> None:
    page = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    scripts = [path for path in EXAMPLES.iterdir() if path.suffix in {".py", ".toml"}]
    assert [path.name for path in scripts if f"]({path.name})" not in page] == []
    outputs = {path.stem for path in (EXAMPLES / "output").iterdir()}
    assert outputs == {path.stem for path in scripts} - {"tool_use"}
    assert [name for name in outputs if f"(output/{name}.txt)" not in page] == []


def test_an_example_has_at_most_sixty_lines() -> None:
    lengths = {path.name: len(path.read_text().splitlines()) for path in EXAMPLES.glob("*.py")}
    assert len(lengths) == 7 and max(lengths.values()) <= 60, lengths


@pytest.mark.parametrize("name", ["own_reward.py", "own_objective.py"])
def test_an_own_reward_and_an_own_objective_teach_a_tiny_model(name: str, output: Output) -> None:
    rewards = numbers("reward", output(name))
    assert len(rewards) == 20 and sum(rewards[-5:]) > sum(rewards[:5]) + 0.5, rewards


def test_an_own_samplers_log_probabilities_are_the_trainers(output: Output) -> None:
    (apart,) = numbers("at most", output("own_sampler.py"))
    assert 0 < apart < 1e-4  # float32, two different forwards


def test_the_kernels_alone_teach_a_model_of_ones_own(output: Output) -> None:
    shares = numbers("token", output("kernels_alone.py"))
    assert shares[0] < 0.3 and shares[-1] > 0.6, shares


def test_trls_trainer_makes_the_same_steps_packed_and_the_scripts_differ_by_two_lines(
    tmp_path: Path, output: Output
) -> None:
    tiny = TinyModel(hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1, intermediate_size=16, max_model_len=128)
    words = [*"0123456789+?", "What", "is"]
    load_policy(ModelConfig(tiny=tiny), vocabulary=words, seed=0, device=torch.device("cpu")).save(tmp_path / "model")
    before, after = (output(f"trl_{name}.py", "model") for name in ("before", "after"))
    losses = [[float(x) for x in re.findall(r"'(-?[\d.]+)'", text[text.index("losses") :])] for text in (before, after)]
    assert len(losses[0]) == 2 and losses[0] == pytest.approx(losses[1], abs=2e-6)
    lines = [(EXAMPLES / f"trl_{name}.py").read_text().splitlines()[1:] for name in ("before", "after")]
    changed = [line for line in difflib.ndiff(*lines) if line[0] in "+-" and line[2:].strip()]
    assert changed == ["+ from isomorph.engine.adapters.trl import pack_groups", "+ pack_groups(trainer)"]
