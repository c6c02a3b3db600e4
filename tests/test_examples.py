"""Every script of examples/ runs as a reader runs it, and does what it says."""

import difflib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from isomorph.engine.config import ModelConfig, TinyModel
from isomorph.engine.model.load import load_policy

EXAMPLES = Path(__file__).parents[1] / "examples"
NUMBER = r"([-+]?\d+\.?\d*(?:e[-+]\d+)?)"


def output(name: str, *arguments: str | Path, cwd: Path) -> str:
    command = [sys.executable, "-P", str(EXAMPLES / name), *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def numbers(label: str, text: str) -> list[float]:
    return [float(found) for found in re.findall(label + " " + NUMBER, text)]


def test_an_example_has_at_most_sixty_lines() -> None:
    lengths = {path.name: len(path.read_text().splitlines()) for path in EXAMPLES.glob("*.py")}
    assert len(lengths) == 6 and max(lengths.values()) <= 60, lengths


@pytest.mark.parametrize("name", ["own_reward.py", "own_objective.py"])
def test_an_own_reward_and_an_own_objective_teach_a_tiny_model(name: str, tmp_path: Path) -> None:
    rewards = numbers("reward", output(name, cwd=tmp_path))
    assert len(rewards) == 20 and sum(rewards[-5:]) > sum(rewards[:5]) + 0.5, rewards


def test_an_own_samplers_log_probabilities_are_the_trainers(tmp_path: Path) -> None:
    (apart,) = numbers("at most", output("own_sampler.py", cwd=tmp_path))
    assert 0 < apart < 1e-4  # float32, two different forwards


def test_the_kernels_alone_teach_a_model_of_ones_own(tmp_path: Path) -> None:
    shares = numbers("token", output("kernels_alone.py", cwd=tmp_path))
    assert shares[0] < 0.3 and shares[-1] > 0.6, shares


def test_trls_trainer_makes_the_same_steps_packed_and_the_scripts_differ_by_two_lines(tmp_path: Path) -> None:
    tiny = TinyModel(hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1, intermediate_size=16, max_model_len=128)
    words = [*"0123456789+?", "What", "is"]
    load_policy(ModelConfig(tiny=tiny), vocabulary=words, seed=0, device=torch.device("cpu")).save(tmp_path / "model")
    before, after = (output(f"trl_{name}.py", "model", cwd=tmp_path) for name in ("before", "after"))
    losses = [[float(x) for x in re.findall(r"'(-?[\d.]+)'", text[text.index("losses") :])] for text in (before, after)]
    assert len(losses[0]) == 2 and losses[0] == pytest.approx(losses[1], abs=2e-6)
    lines = [(EXAMPLES / f"trl_{name}.py").read_text().splitlines()[1:] for name in ("before", "after")]
    changed = [line for line in difflib.ndiff(*lines) if line[0] in "+-" and line[2:].strip()]
    assert changed == ["+ from isomorph.engine.adapters.trl import pack_groups", "+ pack_groups(trainer)"]
