"""Runs the examples and writes what they print into examples/output/.

    python .ci/gallery.py [NAME.py ...]     default: all but tool_use.py, which writes rows alone

Each runs in an empty folder; the TRL scripts get a tiny model of random weights. `tests/test_examples.py` compares what
they print, numbers left out.
"""

import contextlib
import io
import runpy
import sys
import tempfile
from pathlib import Path

import torch

from isomorph.engine.config import ModelConfig, TinyModel
from isomorph.engine.model.load import load_policy

EXAMPLES = Path(__file__).parents[1] / "examples"
TINY = TinyModel(hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1, intermediate_size=16, max_model_len=128)
WORDS = (*"0123456789+?", "What", "is")


def printed(name: str, *arguments: str) -> str:
    """What the example prints."""
    out, before = io.StringIO(), sys.argv
    sys.argv = [name, *arguments]
    try:
        with contextlib.redirect_stdout(out), torch.random.fork_rng(devices=[]):
            runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    finally:
        sys.argv = before
    return out.getvalue()


def main() -> None:
    torch.set_num_threads(1)
    names = sys.argv[1:] or [path.name for path in sorted(EXAMPLES.glob("*.py")) if path.name != "tool_use.py"]
    (EXAMPLES / "output").mkdir(exist_ok=True)
    for name in names:
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            if name.startswith("trl_"):
                load_policy(ModelConfig(tiny=TINY), vocabulary=WORDS, seed=0, device=torch.device("cpu")).save(
                    Path("model")
                )
            text = printed(name, *["model"] * name.startswith("trl_"))
        (EXAMPLES / "output" / name).with_suffix(".txt").write_text(text, encoding="utf-8")
        print(f"examples/output/{Path(name).stem}.txt", flush=True)


if __name__ == "__main__":
    main()
