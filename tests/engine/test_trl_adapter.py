"""TRL's own trainers, packed and unpatched: the same log-probabilities, gradients and weights, fewer tokens."""

import functools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from accelerate import DistributedType
from datasets import Dataset
from peft import AdaptionPromptConfig, LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from small_world import NUM_VOCAB, WORDS, one_thread  # noqa: F401
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, Olmo2Config, Qwen3Config
from truth import exact_norms

from isomorph.engine.adapters.trl import IGNORED, pack_groups, pack_rows
from isomorph.engine.config import UserError
from isomorph.engine.model.text import word_tokenizer

SIZES = dict(
    vocab_size=NUM_VOCAB,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    pad_token_id=0,
    eos_token_id=1,
)
GROUPS = ((5, (4, 1, 7)), (2, (3, 6)), (1, (2,)))  # tokens of a prompt, and of its responses


def model_of(config: type = LlamaConfig, attention: str = "sdpa", **options: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config(**SIZES | options), attn_implementation=attention)


def trainer_of(folder: Path, model: Any, kind: Any = trl.GRPOTrainer, peft: Any = None, **options: Any) -> Any:
    tokenizer = word_tokenizer(WORDS)
    prompts = [f"{WORDS[i % 16]} " * (1 + i % 5) for i in range(16)]

    def reward(completions: list[str], **_: Any) -> list[float]:
        return [float(len(text) % 7) for text in completions]

    configs = {trl.GRPOTrainer: trl.GRPOConfig, trl.RLOOTrainer: trl.RLOOConfig}
    args = configs[kind](
        **dict(
            output_dir=str(folder),
            per_device_train_batch_size=8,
            num_generations=4,
            max_completion_length=6,
            max_steps=2,
            learning_rate=1e-3,
            seed=3,
            use_cpu=True,
            bf16=False,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        )
        | options
    )
    return kind(model, reward, args, Dataset.from_dict({"prompt": prompts}), None, tokenizer, peft_config=peft)


def padded() -> tuple[Tensor, Tensor, Tensor]:
    """Shuffled rows, prompts padded on the left, responses on the right; some tokens of a response are not scored."""
    generator = torch.Generator().manual_seed(1)
    width = max(p for p, _ in GROUPS)
    rows = []
    for num_prompt, responses in GROUPS:
        prompt = torch.randint(2, NUM_VOCAB, (num_prompt,), generator=generator)
        for n in responses:
            response = torch.randint(2, NUM_VOCAB, (n,), generator=generator)
            ids, mask = torch.zeros(width + 8, dtype=torch.int64), torch.zeros(width + 8, dtype=torch.int64)
            ids[width - num_prompt : width + n] = torch.cat([prompt, response])
            mask[width - num_prompt : width + n] = 1
            labels = ids.masked_fill(mask == 0, IGNORED)
            labels[:width] = IGNORED
            labels[width + 2] = IGNORED if n == 6 else labels[width + 2]
            rows.append((ids, mask, labels))
    order = torch.randperm(len(rows), generator=generator).tolist()
    ids, mask, labels = (torch.stack([rows[i][axis] for i in order]) for axis in range(3))
    return ids, mask, labels


Answers = dict[str, Tensor]


def with_gradients(model: Any, labels: Tensor, log_probs: Tensor, entropy: Tensor) -> Answers:
    """Both, where there is a label, and the gradients of a sum with a weight of its own for each."""
    is_target = labels[:, 1:] != IGNORED
    model.zero_grad()
    weights = torch.linspace(0.5, 2.0, int(is_target.sum()), dtype=log_probs.dtype)
    (weights * (log_probs + 0.3 * entropy)[is_target]).sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"log_probs": log_probs.detach()[is_target], "entropy": entropy.detach()[is_target], **grads}


def asked(model: Any, ids: Tensor, mask: Tensor, labels: Tensor) -> Answers:
    """TRL's call for log-probabilities."""
    answer = model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True)
    ignored = labels[:, 1:] == IGNORED
    assert (answer.log_probs[ignored] == 0).all() and (answer.entropy[ignored] == 0).all()
    return with_gradients(model, labels, answer.log_probs, answer.entropy)


def from_logits(model: Any, ids: Tensor, mask: Tensor, labels: Tensor, temperature: float) -> Answers:
    positions = (mask.cumsum(-1) - 1).clamp(min=0)  # angles are float32: counted from elsewhere they differ in rounding
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, :-1]
    logprob = (logits / temperature).log_softmax(-1)
    entropy = -(logprob.exp() * logprob).sum(-1)
    return with_gradients(model, labels, logprob.gather(2, ids[:, 1:, None])[..., 0], entropy)


FAMILIES = pytest.mark.parametrize(
    "make",
    [
        functools.partial(model_of, tie_word_embeddings=True),
        functools.partial(model_of, Qwen3Config, head_dim=8, tie_word_embeddings=False),
        functools.partial(model_of, Olmo2Config, tie_word_embeddings=False),
    ],
    ids=["llama", "qwen3", "olmo2"],
)


@FAMILIES
@pytest.mark.parametrize("recomputes", [False, True])
def test_answers_and_gradients_are_those_of_padded_rows(
    tmp_path: Path, make: Callable[[], Any], recomputes: bool
) -> None:
    trainer = trainer_of(tmp_path, make(), gradient_checkpointing=recomputes, temperature=0.7)
    trainer.model.train()
    batch = padded()
    as_it_comes = asked(trainer.model, *batch)
    pack_groups(trainer)
    seen: list[int] = []
    hook = lambda _, arguments, out: seen.append(out.shape[:2].numel())  # noqa: E731
    trainer.model.model.embed_tokens.register_forward_hook(hook)
    packed = asked(trainer.model, *batch)
    assert seen == [sum(p + sum(n - 1 for n in responses) for p, responses in GROUPS)]  # of 6 rows of 13

    exact_model = exact_norms(trainer.model).double()
    exact, packed_exactly = from_logits(exact_model, *batch, temperature=0.7), asked(exact_model, *batch)
    assert exact.keys() == packed.keys() == as_it_comes.keys()
    for name, truth in exact.items():
        torch.testing.assert_close(packed_exactly[name], truth, rtol=1e-10, atol=1e-12, msg=lambda m: f"{name}: {m}")  # noqa: B023
        error, bound = ((answers[name] - truth).abs().max() for answers in (packed, as_it_comes))
        assert error <= 4 * bound + 8 * torch.finfo(torch.float32).eps * truth.abs().max(), name


@pytest.mark.parametrize("kind", [trl.GRPOTrainer, trl.RLOOTrainer])
@pytest.mark.parametrize("adapts", [False, True], ids=["whole", "lora"])
def test_a_trainer_trains_the_same_model(tmp_path: Path, kind: Any, adapts: bool) -> None:
    """Two steps, with a reference, recomputation and several updates on a step's responses."""
    model_of().save_pretrained(tmp_path / "model")
    ended = {}
    for packs in (False, True):
        lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM") if adapts else None
        trainer = trainer_of(tmp_path, str(tmp_path / "model"), kind, lora, beta=0.1, num_iterations=2)
        if packs:
            pack_groups(trainer)
        trainer.train()
        ended[packs] = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    start = model_of().state_dict()
    assert adapts or not any(torch.equal(start[name], weight) for name, weight in ended[False].items())
    for name, weight in ended[False].items():
        torch.testing.assert_close(ended[True][name], weight, rtol=1e-3, atol=1e-4, msg=lambda m: f"{name}: {m}")  # noqa: B023


@pytest.mark.parametrize("widens_head", [False, True])
def test_autocast_and_generation_stay_trls(tmp_path: Path, widens_head: bool) -> None:
    trainer = trainer_of(tmp_path, model_of(), bf16=True, cast_lm_head_to_fp32=widens_head)
    batch = padded()
    with trainer.accelerator.autocast():
        as_it_comes = asked(trainer.model, *batch)
    words = torch.randint(2, NUM_VOCAB, (3, 5), generator=torch.Generator().manual_seed(2))
    mask = torch.tensor([[0, 0, 1, 1, 1], [1] * 5, [0] + [1] * 4])
    drawn = trainer.model.generate(words, attention_mask=mask, max_new_tokens=6, do_sample=False)
    pack_groups(trainer)
    with trainer.accelerator.autocast():
        packed = asked(trainer.model, *batch)
    assert packed["log_probs"].dtype == torch.float32
    again = trainer.model.generate(words, attention_mask=mask, max_new_tokens=6, do_sample=False)
    assert torch.equal(again, drawn)
    exact = from_logits(exact_norms(trainer.model).double(), *batch, temperature=1.0)
    for name, truth in exact.items():
        error, bound = ((answers[name] - truth).abs().max() for answers in (packed, as_it_comes))
        assert error <= 2 * bound + 2 * torch.finfo(torch.bfloat16).eps * truth.abs().max(), name


def test_a_batch_without_labels_has_gradients_of_zero(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, model_of())
    pack_groups(trainer)
    ids, mask, labels = padded()
    answer = trainer.model(input_ids=ids, attention_mask=mask, labels=labels.fill_(IGNORED), fused_lm_head=True)
    answer.log_probs.sum().backward()
    for name, p in trainer.model.named_parameters():
        assert p.grad is not None and (p.grad == 0).all(), name


def test_a_row_that_begins_with_a_label_is_refused() -> None:
    ids = torch.tensor([[0, 5, 6]])
    with pytest.raises(ValueError, match="row 0 begins with a label"):
        pack_rows(ids, torch.tensor([[0, 1, 1]]), ids.masked_fill(ids == 0, IGNORED))


def test_what_cannot_be_packed_is_refused_with_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs a GRPOTrainer or an RLOOTrainer, got object"):
        pack_groups(object())
    with pytest.raises(UserError, match="attn_implementation='sdpa', got 'eager'"):
        pack_groups(trainer_of(tmp_path, model_of(attention="eager")))
    trainer = trainer_of(tmp_path, model_of())
    trainer.accelerator.state.distributed_type = DistributedType.FSDP
    try:
        with pytest.raises(UserError, match="whole model on every device .*, got FSDP"):
            pack_groups(trainer)
    finally:
        trainer.accelerator.state.distributed_type = DistributedType.NO


@pytest.mark.parametrize(
    "method",
    [
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
        PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
        AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=2, adapter_layers=1),
    ],
    ids=lambda method: method.peft_type.value,
)
def test_a_learned_prompt_is_refused_by_name(tmp_path: Path, method: Any) -> None:
    trainer = trainer_of(tmp_path, get_peft_model(model_of(), method))
    with pytest.raises(UserError, match=f"PEFT's {method.peft_type.value} puts a learned prompt before"):
        pack_groups(trainer)


def test_a_model_on_several_devices_is_refused(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, model_of(tie_word_embeddings=False))
    trainer.model.lm_head.to("meta")
    with pytest.raises(UserError, match="whole model on one device, got cpu and meta"):
        pack_groups(trainer)


RANKS = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import torch
import trl
from peft import LoraConfig
from test_trl_adapter import pack_groups, trainer_of

folder = Path(sys.argv[2])
for kind, adapts in ((trl.GRPOTrainer, False), (trl.RLOOTrainer, True)):
    ended = []
    for packs in (False, True):
        lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM") if adapts else None
        model = str(folder / "model")
        trainer = trainer_of(folder, model, kind, lora, per_device_train_batch_size=4, beta=0.1, num_iterations=2)
        if packs:
            pack_groups(trainer)
        trainer.train()
        ended.append(trainer.model.state_dict())
    for name, weight in ended[0].items():
        torch.testing.assert_close(ended[1][name], weight, rtol=1e-3, atol=1e-4)
    ranks = trainer.accelerator
    print(f"{ranks.num_processes} of {ranks.distributed_type.name} agree on {kind.__name__}", flush=True)
"""


@pytest.mark.slow
def test_data_parallel_trains_the_same_model(tmp_path: Path) -> None:
    """A whole model with GRPO, an adapter with RLOO, both with a reference, on two gloo ranks."""
    model_of().save_pretrained(tmp_path / "model")
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(script), str(Path(__file__).parent), str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    done = subprocess.run(command, timeout=240, capture_output=True, text=True, env=environment)
    for kind in ("GRPOTrainer", "RLOOTrainer"):
        assert done.stdout.count(f"2 of MULTI_CPU agree on {kind}") == 2, done.stderr
