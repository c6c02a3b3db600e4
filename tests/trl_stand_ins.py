"""Local stand-ins for the tiny models and data sets of the hub that TRL's tests name.

TRL's tests load ``trl-internal-testing/<name>`` from the hub. A folder of that relative path in the working directory
is loaded instead, so nothing is replaced in transformers or datasets. The rows of the data sets come from the scripts
in TRL's checkout; the models are random, of the same families and with the numbers of TRL's own scripts. The tokenizer
is trained here on Python's help texts, and the chat templates are those in the installed TRL.
"""

import functools
import importlib
import json
import pydoc_data.topics
import shutil
import sys
from pathlib import Path
from typing import Any
from unittest import mock

OWNER = "trl-internal-testing"
NUM_TOKENS = 8192
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
IMAGE = ("<image>", "<image_soft_token>", "<start_of_image>", "<end_of_image>")
KEPT = ("<tool_call>", "</tool_call>", "<think>", "</think>")  # decoding does not skip these
# tokens at their places in Qwen's vocabulary: tests give some answers of a model as ids
QWEN = {
    **{"!": 0, ",": 11, "1": 16, "2": 17, "3": 18, "4": 19, ":": 25, "<": 27, ">": 29, "I": 40, "a": 64, "b": 65},
    **{"c": 66, "Ċ": 198, "Ġ": 220, "Ġb": 293, "Ġ{": 314, 'Ġ"': 330, ">Ċ": 397, "out": 411, "de": 450, '",': 497},
    **{"</": 522, "name": 606, '":': 788, "Ġany": 894, "sh": 927, "'t": 944, "text": 1318, "Ġknow": 1414, "Ġdon": 1513},
    **{"Ġwon": 2765, '{"': 4913, 'Ġ{"': 5212, "Ġtool": 5392, "hi": 6023, "call": 6659, "async": 7692, "step": 9520},
    **{"}}Ċ": 11248, "crement": 13477, "tool": 14172, "Ġincrement": 16252, "arguments": 16370, "Done": 17453},
    **{"_tool": 22785, "increment": 35744, "multiply": 64648, "_multiply": 93054, '"}}Ċ': 95642},
    **{"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645, "<tool_call>": 151657},
    **{"</tool_call>": 151658, "<think>": 151667, "</think>": 151668},
}
SIZES = dict(hidden_size=8, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2, intermediate_size=32)
LARGER = SIZES | dict(hidden_size=16)
EXPERTS = dict(num_experts_per_tok=2, moe_intermediate_size=32)
NUM_PIXELS = 56  # the sides of an image
VISION: dict[str, Any] = dict(
    num_hidden_layers=2,
    hidden_size=16,
    num_attention_heads=4,
    intermediate_size=32,
    patch_size=14,
    image_size=NUM_PIXELS,
)

# name: transformers' model type, the chat template of the installed TRL or None, the configuration
CAUSAL: dict[str, tuple[str, str | None, dict[str, Any]]] = {
    "tiny-Qwen2ForCausalLM-2.5": ("qwen2", "qwen2_5", SIZES),
    "tiny-Qwen3ForCausalLM": ("qwen3", "qwen3", SIZES),
    "tiny-LlamaForCausalLM-3.2": ("llama", "llama3_2", SIZES),
    "tiny-MistralForCausalLM-0.2": ("mistral", None, SIZES),
    "tiny-Cohere2ForCausalLM": ("cohere2", "cohere2", SIZES | dict(logit_scale=1.0)),
    "tiny-Gemma2ForCausalLM": ("gemma2", "gemma", SIZES),
    "tiny-Glm4MoeForCausalLM": ("glm4_moe", "glm4moe", SIZES | EXPERTS | dict(head_dim=2, n_routed_experts=4)),
    "tiny-GptOssForCausalLM": ("gpt_oss", "gptoss", SIZES | dict(num_local_experts=4, num_experts_per_tok=2)),
    "tiny-Qwen3MoeForCausalLM": ("qwen3_moe", "qwen3", SIZES | dict(num_experts=4, num_experts_per_tok=2)),
    "tiny-NemotronHForCausalLM-nano": (
        "nemotron_h",
        "nemotron_3_nano",
        {key: value for key, value in LARGER.items() if key != "num_hidden_layers"}
        | EXPERTS
        | dict(layers_block_type=["mamba", "attention", "moe"], mamba_num_heads=8, mamba_head_dim=4, mamba_n_groups=1)
        | dict(ssm_state_size=16, n_routed_experts=4, moe_shared_expert_intermediate_size=32),
    ),
}
WIDE = ("tiny-Qwen2ForCausalLM-2.5", "tiny-Qwen3ForCausalLM")
JUDGES = {
    "tiny-Qwen2ForSequenceClassification-2.5": ("qwen2", "qwen2_5"),
    "tiny-Qwen3ForSequenceClassification": ("qwen3", "qwen3"),
    "tiny-LlamaForSequenceClassification-3.2": ("llama", "llama3_2"),
}


def make(checkout: Path, scratch: Path) -> None:
    """Writes all stand-ins under ``scratch``, and under ``scratch / "wide"`` some with the ids of Qwen's vocabulary.

    There the mixture of experts on which TRL tests tools is a dense model. Every step takes long with so many ids.
    """
    home = scratch / OWNER
    _data(checkout, scratch)
    for name, (kind, template, config) in CAUSAL.items():
        _causal(home / name, kind, tokenizer(template), config)
    for name, (kind, template) in JUDGES.items():
        _judge(home / name, kind, template)
    _remote(checkout, home / "tiny-RemoteForCausalLM")
    _gemma3(home / "tiny-Gemma3ForConditionalGeneration")
    _llava_next(home / "tiny-LlavaNextForConditionalGeneration")
    wide = scratch / "wide" / OWNER
    shutil.copytree(home, wide)
    for name, like in {**dict.fromkeys(WIDE, None), "tiny-Qwen3MoeForCausalLM": "tiny-Qwen3ForCausalLM"}.items():
        kind, template, config = CAUSAL[like or name]
        shutil.rmtree(wide / name)
        _causal(wide / name, kind, tokenizer(template, at=QWEN), config)


def _data(checkout: Path, scratch: Path) -> None:
    """The rows of TRL's own scripts, written as Parquet files instead of pushed to the hub."""
    import datasets

    def write(splits: Any, repo: str, config_name: str) -> None:
        for split, rows in splits.items():
            folder = scratch / repo / config_name
            folder.mkdir(parents=True, exist_ok=True)
            rows.to_parquet(str(folder / f"{split}.parquet"))

    sys.path.insert(0, str(checkout / "scripts"))
    for name in ("zen", "zen-image", "zen-multi-image"):
        script = importlib.import_module(f"generate_{name.replace('-', '_')}_dataset")
        with mock.patch.object(datasets.DatasetDict, "push_to_hub", write):
            script.main(0.1, True, f"{OWNER}/{name}")
        folder = scratch / OWNER / name
        configs = [
            {
                "config_name": config.name,
                "data_files": [{"split": s, "path": f"{config.name}/{s}.parquet"} for s in ("train", "test")],
            }
            for config in sorted(folder.iterdir())
        ]
        (folder / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")
    sys.path.remove(str(checkout / "scripts"))


def tokenizer(template: str | None, at: dict[str, int] | None = None, **marks: str) -> Any:
    """A byte-level BPE tokenizer with a chat template of the installed TRL; without one, the messages' texts.

    ``at`` has the ids of some tokens; the others are numbered around them.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from trl import chat_template_utils

    tokens, merges = _learned()
    at = at or {}
    free = iter(sorted(set(range(len(tokens) + len(at))) - set(at.values())))
    bpe = Tokenizer(models.BPE(at | {token: next(free) for token in tokens if token not in at}, merges))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens([*SPECIAL, *IMAGE])
    bpe.add_tokens([AddedToken(token, normalized=False) for token in KEPT])
    made = PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<|endoftext|>", eos_token="<|im_end|>", extra_special_tokens=marks
    )
    plain = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    made.chat_template = getattr(chat_template_utils, f"{template}_chat_template") if template else plain
    return made


@functools.cache
def _learned() -> tuple[list[str], list[tuple[str, str]]]:
    """The tokens, the special ones first, and the merges."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=NUM_TOKENS,
        special_tokens=[*SPECIAL, *IMAGE, *KEPT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator(pydoc_data.topics.topics.values(), trainer)
    learned = json.loads(bpe.to_str())["model"]
    return sorted(learned["vocab"], key=learned["vocab"].get), [tuple(merge) for merge in learned["merges"]]


def _save(folder: Path, model: Any, words: Any) -> None:
    import torch

    for module in model.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv1d):
            torch.nn.init.xavier_uniform_(module.weight)
    model.to(torch.bfloat16).save_pretrained(folder)
    words.save_pretrained(folder)


def _ids(words: Any) -> dict[str, Any]:
    return dict(
        vocab_size=max(words.get_vocab().values()) + 1,
        pad_token_id=words.pad_token_id,
        eos_token_id=words.eos_token_id,
        bos_token_id=None,
    )


def _causal(folder: Path, kind: str, words: Any, config: dict[str, Any]) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    _save(folder, AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **config, **_ids(words))), words)


def _judge(folder: Path, kind: str, template: str) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    torch.manual_seed(0)
    words = tokenizer(template)
    config = AutoConfig.for_model(kind, num_labels=1, **LARGER, **_ids(words))
    _save(folder, AutoModelForSequenceClassification.from_config(config), words)


def _remote(checkout: Path, folder: Path) -> None:
    """A llama whose classes are code of the checkout, loaded with trust_remote_code=True alone."""
    _causal(folder, "llama", tokenizer("llama3_2"), SIZES)
    for file in (checkout / "scripts/generate_tiny_models/for_causal_lm/_remote_code").glob("*_remote.py"):
        shutil.copy(file, folder)
    path = folder / "config.json"
    classes = {
        "AutoConfig": "configuration_remote.RemoteConfig",
        "AutoModel": "modeling_remote.RemoteModel",
        "AutoModelForCausalLM": "modeling_remote.RemoteForCausalLM",
        "AutoModelForSequenceClassification": "modeling_remote.RemoteForSequenceClassification",
    }
    config = json.loads(path.read_text()) | {"model_type": "remote", "auto_map": classes}
    path.write_text(json.dumps(config | {"architectures": ["RemoteForCausalLM"]}))


def _gemma3(folder: Path) -> None:
    import torch
    from transformers import AutoConfig, Gemma3ForConditionalGeneration, Gemma3Processor
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    torch.manual_seed(0)
    marks = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    words = tokenizer("gemma3", **marks)
    images = Gemma3ImageProcessorPil(size={"height": NUM_PIXELS, "width": NUM_PIXELS})
    num_patches = (NUM_PIXELS // VISION["patch_size"]) ** 2
    processor = Gemma3Processor(images, words, words.chat_template, num_patches)
    config = AutoConfig.for_model(
        "gemma3",
        text_config=LARGER | dict(head_dim=4) | _ids(words),
        vision_config=VISION | dict(vision_use_head=False),
        mm_tokens_per_image=num_patches,
        **{f"{name}_index": words.convert_tokens_to_ids(mark) for name, mark in marks.items()},
    )
    _save(folder, Gemma3ForConditionalGeneration(config), processor)


def _llava_next(folder: Path) -> None:
    import torch
    from transformers import AutoConfig, LlavaNextForConditionalGeneration, LlavaNextProcessor
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    torch.manual_seed(0)
    words = tokenizer("llava_next")
    pinpoints = [[NUM_PIXELS, 2 * NUM_PIXELS], [2 * NUM_PIXELS, NUM_PIXELS]]
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": NUM_PIXELS},
        crop_size={"height": NUM_PIXELS, "width": NUM_PIXELS},
        image_grid_pinpoints=pinpoints,
    )
    processor = LlavaNextProcessor(
        images,
        words,
        patch_size=VISION["patch_size"],
        vision_feature_select_strategy="default",
        chat_template=words.chat_template,
        image_token="<image>",
        num_additional_image_tokens=1,
    )
    config = AutoConfig.for_model(
        "llava_next",
        text_config=LARGER | dict(model_type="mistral") | _ids(words),
        vision_config=VISION | dict(model_type="clip_vision_model"),
        image_grid_pinpoints=pinpoints,
        image_token_index=words.convert_tokens_to_ids("<image>"),
    )
    _save(folder, LlavaNextForConditionalGeneration(config), processor)
