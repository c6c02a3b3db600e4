"""A policy on the disk: what is saved loads in transformers and here; what is broken is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from small_policy import CPU, VOCABULARY, logits, packed, tiny_policy
from small_world import one_thread  # noqa: F401

from isomorph.engine.config import ModelConfig, UserError
from isomorph.engine.model.load import load_policy
from isomorph.engine.model.text import word_tokenizer


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_saved_policy_loads_in_transformers_with_the_same_logits(tmp_path: Path, dtype: Any) -> None:
    policy = tiny_policy(getattr(torch, dtype))
    policy.save(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.dtype == getattr(torch, dtype)
    assert model.config._attn_implementation != "isomorph"
    assert "isomorph" not in (tmp_path / "config.json").read_text()
    ids = [2, 5, 6, 7, 8]
    with torch.no_grad():
        ours = policy.hidden(packed([(ids[:2], [ids[2:]])])) @ policy.unembedding.T
    tolerance = dict(rtol=0, atol=1e-5 if dtype == "float32" else 0.05)
    torch.testing.assert_close(ours, logits(model, ids), **tolerance)  # type: ignore[arg-type]
    assert all(torch.equal(p, policy.named_parameters()[name].detach()) for name, p in model.named_parameters())


def test_a_saved_policy_loads_again_with_its_tokenizer(tmp_path: Path) -> None:
    policy = tiny_policy()
    policy.save(tmp_path)
    again = load_policy(ModelConfig(path=str(tmp_path)), vocabulary=[], seed=0, device=CPU)
    assert all(torch.equal(a, b) for a, b in zip(policy.snapshot(), again.snapshot(), strict=True))
    question = "stir : 5 minutes , take <answer> 30 </answer>"
    assert again.text.encode_prompt(question) == policy.text.encode_prompt(question)
    assert again.text.encode_response(question) == policy.text.encode_response(question)
    assert again.text.decode(again.text.encode_response(question)) == question
    assert again.text.stop_ids == policy.text.stop_ids


def test_a_saved_policy_loads_where_isomorph_is_not_installed(tmp_path: Path) -> None:
    tiny_policy().save(tmp_path)
    program = (
        "import sys, torch, transformers\n"
        "sys.modules['isomorph'] = None  # its import raises ImportError\n"
        "model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "ids = tokenizer('stir 5', return_tensors='pt')\n"
        "print(model.generate(**ids, max_new_tokens=3, do_sample=False).shape[1] > 3)\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", program, str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == "True", done.stderr[-2000:]


def test_only_loading_a_model_changes_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    program = (
        "import os\n"
        "before = dict(os.environ)\n"
        "import isomorph.engine.adapters.trl, isomorph.engine.model.load\n"
        "assert dict(os.environ) == before, set(os.environ) ^ set(before)\n"
    )
    clean = {key: value for key, value in os.environ.items() if key != "TOKENIZERS_PARALLELISM"}
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, env=clean, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)  # an earlier test has loaded a model
    tiny_policy()
    assert os.environ["TOKENIZERS_PARALLELISM"] == "false"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    tiny_policy().save(tmp_path)
    return tmp_path


def refusal(path: Path | str) -> str:
    with pytest.raises(UserError) as caught:
        load_policy(ModelConfig(path=str(path)), vocabulary=[], seed=0, device=CPU)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    assert "config.json" in refusal(tmp_path)
    assert "config.json" in refusal(tmp_path / "nowhere")
    assert "no such file" in refusal(tmp_path / "nowhere.gguf")
    (tmp_path / "text.gguf").write_text("not a model")
    assert "text.gguf" in refusal(tmp_path / "text.gguf")


def test_a_name_without_an_owner_that_is_no_folder_is_refused_without_asking_the_hub() -> None:
    said = refusal(Path("my-model"))
    assert f"there is no folder {Path.cwd() / 'my-model'}, and a name on the Hugging Face hub is OWNER/NAME" in said


def test_broken_files_of_a_model_are_refused(saved: Path) -> None:
    weights = saved / "model.safetensors"
    whole = weights.read_bytes()
    for broken in (whole[: len(whole) // 2], b"", b"garbage" * 100):
        weights.write_bytes(broken)
        assert str(saved) in refusal(saved)
    weights.unlink()
    assert str(saved) in refusal(saved)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *(
            (name, text)
            for name in ("config.json", "tokenizer.json", "tokenizer_config.json")
            for text in ("{", "[]", "\0")
        ),
        ("config.json", '{"model_type": "unheard of"}'),
        ("tokenizer.json", '{"model": 3}'),
    ],
)
def test_broken_descriptions_of_a_model_are_refused(saved: Path, name: str, content: str) -> None:
    (saved / name).write_text(content)
    assert str(saved) in refusal(saved)


def test_weights_that_are_missing_from_the_file_are_not_made_up(saved: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(saved / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, saved / "model.safetensors", metadata={"format": "pt"})
    assert "model.layers.1.mlp.up_proj.weight" in refusal(saved)


def test_weights_of_another_shape_are_refused(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**config, "intermediate_size": 48}))
    assert str(saved) in refusal(saved)


def test_a_model_of_another_family_is_refused_when_loaded(tmp_path: Path) -> None:
    config = transformers.GPT2Config(vocab_size=45, n_embd=8, n_layer=1, n_head=2, n_positions=16, eos_token_id=1)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    word_tokenizer(VOCABULARY).save_pretrained(tmp_path)
    assert "'gpt2'" in refusal(tmp_path)


def test_a_model_may_stop_on_more_than_the_tokenizers_end(saved: Path) -> None:
    (saved / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 1, 9]}))
    again = load_policy(ModelConfig(path=str(saved)), vocabulary=[], seed=0, device=CPU)
    assert again.text.stop_ids == (1, 7, 9)
