"""Memory of a rank with FSDP2: loading a model and writing a checkpoint take shards of it, never the whole."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from crowd import Crowd
from safetensors.torch import load_file, save_file
from small_policy import tiny_policy
from transformers import AutoModelForCausalLM, LlamaConfig

from isomorph.engine.config import ModelConfig
from isomorph.engine.distributed.fsdp import full_tensor, shard
from isomorph.engine.distributed.ranks import Ranks
from isomorph.engine.model.load import load_policy, read_weights
from isomorph.engine.record.saver import Saver
from isomorph.engine.types import RunState

MIB = 2**20
SLACK = 24 * MIB  # a unit of FSDP2 that is being cut, buffers of the disk and of gloo


def model_folder(folder: Path, **sizes: int) -> Path:
    """A Llama of random bfloat16 weights, in two files with an index, and a tokenizer."""
    tiny_policy().save(folder)
    (folder / "model.safetensors").unlink()
    config = LlamaConfig.from_pretrained(folder)
    for name, size in sizes.items():
        setattr(config, name, size)
    config.head_dim = config.hidden_size // config.num_attention_heads
    config.save_pretrained(folder)
    policy = load_meta(config)
    generator = torch.Generator().manual_seed(0)
    shapes = {name: p.shape for name, p in policy.named_parameters()}
    names, index = sorted(shapes), {}
    for i, part in enumerate((names[::2], names[1::2])):
        rows = {n: torch.empty(shapes[n], dtype=torch.bfloat16).random_(-8, 9, generator=generator) / 64 for n in part}
        save_file(rows, folder / f"part-{i}.safetensors", metadata={"format": "pt"})
        index |= dict.fromkeys(part, f"part-{i}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


def load_meta(config: Any) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def loaded(folder: Path, dtype: str, *, defers: bool) -> Any:
    config = ModelConfig(path=str(folder), dtype=dtype)  # type: ignore[arg-type]
    return load_policy(config, vocabulary=[], seed=0, device=torch.device("cpu"), defers=defers)


def peak_growth(folder: Path, ranks: Ranks, root: Path) -> dict[str, int]:
    """Growth of this rank's peak memory while it loads, and while it writes a checkpoint; bytes of the model."""
    before = reset_peak()
    policy = loaded(folder, "bfloat16", defers=True)
    shard(policy)
    read_weights(policy)
    found = {"load": peak() - before, "model": 4 * sum(p.numel() for p in policy.named_parameters().values())}
    for waits in (True, False):
        ranks.wait()
        before, saver = reset_peak(), Saver()
        saver.save(root, RunState(step=int(waits)), policy.stored(), {}, ranks, keep=1, waits=waits)
        saver.settle(ranks, waits=True)
        found["waiting" if waits else "background"] = peak() - before
    return found


def growth(ranks: Ranks, folder: Path, root: Path) -> dict[str, int]:
    return peak_growth(folder, ranks, root)


def reset_peak() -> int:
    """Sets the peak of this process's resident memory to its present value, which it returns."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def test_no_rank_holds_a_whole_model_while_it_loads_or_writes_a_checkpoint(tmp_path: Path) -> None:
    sizes = dict(hidden_size=512, intermediate_size=1536, num_hidden_layers=16, num_attention_heads=8)
    folder = model_folder(tmp_path / "model", **sizes, num_key_value_heads=8)
    crowd = Crowd(2)
    try:
        for found in crowd.ask(growth, folder, tmp_path / "checkpoints"):
            own = found["model"] / 2
            assert found["model"] > 200 * MIB
            # float32 masters of half the model, and the pages of half the bfloat16 files that they were read from;
            # less where memory that was freed before is used again
            assert own / 2 < found["load"] < own + own / 2 + SLACK
            assert found["waiting"] < SLACK  # the shards are written from where they are
            assert found["background"] < own + SLACK
    finally:
        crowd.close()


def weights_of(ranks: Ranks, folder: Path, dtype: str) -> tuple[bool, dict[str, torch.Tensor], tuple[str, ...]]:
    policy = loaded(folder, dtype, defers=True)
    is_deferred = bool(policy.unread)
    shard(policy)
    read_weights(policy)
    return is_deferred, {name: full_tensor(w) for name, w in policy.stored().items()}, policy.notes


@pytest.fixture(scope="module")
def crowd(request: pytest.FixtureRequest) -> Crowd:
    crowd = Crowd(3)
    request.addfinalizer(crowd.close)
    return crowd


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_shards_hold_the_weights_of_a_model_that_is_loaded_whole(crowd: Crowd, tmp_path: Path, dtype: str) -> None:
    folder = model_folder(tmp_path, hidden_size=40, num_attention_heads=4, num_key_value_heads=2)
    whole = loaded(folder, dtype, defers=False)
    for is_deferred, found, _ in crowd.ask(weights_of, folder, dtype):
        assert is_deferred and found.keys() == whole.stored().keys()
        for name, weight in whole.stored().items():
            assert found[name].dtype == torch.float32 and torch.equal(found[name].to(weight.dtype), weight), name


def test_a_model_whose_files_have_other_names_is_loaded_whole_and_said_so(crowd: Crowd, tmp_path: Path) -> None:
    tiny_policy().save(tmp_path)
    named = load_file(tmp_path / "model.safetensors")
    named["lm_head.weight"] = named["model.embed_tokens.weight"] + 1  # beside an embedding that config.json ties it to
    save_file(named, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for is_deferred, found, notes in crowd.ask(weights_of, tmp_path, "float32"):
        assert not is_deferred and torch.equal(found["lm_head.weight"], named["lm_head.weight"])
        assert any("loaded whole by every rank" in note for note in notes)
