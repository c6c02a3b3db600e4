"""Loads the model of a recipe, or builds a tiny one; or reads its sizes alone, without weights.

Everything that can be wrong with model, tokenizer and chat template is checked here, before the first step.
"""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
from transformers.utils import cached_file

from isomorph.engine.config import LoraConfig, ModelConfig, TinyModel, UserError
from isomorph.engine.distributed.shards import read_into, saved_in
from isomorph.engine.foreign import foreign
from isomorph.engine.hub import hub_model
from isomorph.engine.model.attention import registered_attention
from isomorph.engine.model.check import end_ids, limit_to_window, repair_generation_config, try_saving, untie
from isomorph.engine.model.families import normalises_heads, normalises_outputs, refuse_unsupported
from isomorph.engine.model.lora import attach, require_peft
from isomorph.engine.model.policy import Policy
from isomorph.engine.model.text import TextCodec, byte_tokenizer, open_text, word_tokenizer
from isomorph.engine.planner import ModelShape

# Python files of a model's folder are never run. Without this transformers asks on the terminal whether to run them.
NO_CODE = False
# a folder with a tokenizer has at least one of these
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tokenizer_config.json")


def silence_loaders() -> None:
    """Turns transformers' progress bars off for this process; its warnings stay."""
    transformers.utils.logging.disable_progress_bar()


def load_policy(
    config: ModelConfig,
    *,
    vocabulary: Sequence[str],
    seed: int,
    device: torch.device,
    lora: LoraConfig | None = None,
    tags: Sequence[str] = (),
    defers: bool = False,
) -> Policy:
    """The policy of ``config`` on ``device``: loaded from ``config.path``, or built by ``config.tiny``.

    ``defers``: the parameters are left on the meta device where the files allow it, and ``Policy.unread`` names the
    files: shard them, then call ``read_weights``. Files that no part can be read of (GGUF, pickled ones, a tied
    unembedding that has a tensor of its own) are loaded whole, which ``Policy.notes`` says.

    Model, tokenizer and chat template are checked against each other, and saving is tried; what was repaired is in
    ``Policy.notes``. ``vocabulary``: words of a tiny model. ``seed``: of a tiny model's weights and of the adapters.
    ``tags``: the strings around an answer, which must survive encoding and decoding. Raises UserError.
    """
    if lora is not None:
        require_peft()  # before the weights are read, which takes long
    dtype = getattr(torch, config.dtype)
    unread: tuple[Path, ...] = ()
    notes: list[str] = []
    if config.tiny is not None:
        model, tokenizer = _tiny_model(config.tiny, vocabulary, seed=seed, dtype=dtype)
        text = _opened_text(model, tokenizer, config, tags)
    else:
        assert config.path is not None
        model, tokenizer, unread, notes = _loaded_model(config.path, dtype, defers=defers)
        with _about(config.path):
            notes += untie(model) + limit_to_window(model)
            if defers and not unread:
                notes.append("the weights were loaded whole by every rank: no safetensors files with exactly its names")
            text = _opened_text(model, tokenizer, config, tags)
            notes += repair_generation_config(model, text)
            try_saving(model, tokenizer)
    adapters = None if lora is None else attach(model, lora, seed=seed, base=config.path)
    gradient_checkpointing_every, compiles = config.gradient_checkpointing_every, config.compile
    policy = Policy(
        model if unread else model.to(device),
        text,
        device=device,
        gradient_checkpointing_every=gradient_checkpointing_every,
        compiles=compiles,
        adapters=adapters,
    )
    policy.notes = (*notes, *text.notes)
    policy.unread = unread
    return policy


def read_weights(policy: Policy) -> None:
    """Reads the weights of a policy that was loaded with ``defers``: with FSDP2, of each tensor this rank's rows.

    Raises UserError where a file cannot be read.
    """
    if not policy.unread:
        return
    with foreign(f"model.path: the weights in {policy.unread[0].parent} could not be read"):
        read_into(policy.unread, policy.stored())
    policy.unread = ()


@contextlib.contextmanager
def _about(path: str) -> Iterator[None]:
    """Context: puts the model's path before the message of a UserError."""
    try:
        yield
    except UserError as error:
        raise UserError(f"model.path: {path}: {error}") from error


def _loaded_model(path: str, dtype: torch.dtype, *, defers: bool) -> tuple[Any, Any, tuple[Path, ...], list[str]]:
    """Model, tokenizer, the files of its weights where ``defers`` is set and the model has none yet, and notes."""
    with _located(path) as (folder, gguf, notes), foreign(f"model.path: no model could be loaded from {path!r}"):
        tokenizer = _loaded_tokenizer(path, folder, gguf)
        loader_options = dict(gguf, quantization_config=transformers.GgufConfig(dequantize=True)) if gguf else {}
        _refuse_broken_generation_config(Path(folder))
        if defers and not gguf and (found := _deferred_model(folder, dtype)) is not None:
            return found[0], tokenizer, found[1], notes
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation=registered_attention(),
            output_loading_info=True,
            trust_remote_code=NO_CODE,
            **loader_options,
        )
    model, loading = loaded
    if missing := sorted(loading["missing_keys"]):  # transformers would initialise them randomly
        raise UserError(
            f"model.path: the weights in {path!r} lack {len(missing)} tensors of a {model.config.model_type} model, "
            f"the first is {missing[0]}: use a complete checkpoint of the model that config.json describes"
        )
    model.config._attn_implementation = registered_attention()
    return model, tokenizer, (), notes


def _deferred_model(folder: str, dtype: torch.dtype) -> tuple[Any, tuple[Path, ...]] | None:
    """The model on the meta device, and the files of its weights; None where their names are not the model's own."""
    files = _weight_files(folder)
    if not files:
        return None
    model_config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=NO_CODE)
    refuse_unsupported(model_config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config, attn_implementation=registered_attention(), dtype=dtype)
    if saved_in(files).keys() != dict(model.named_parameters()).keys():
        return None
    # its buffers are computed, not read
    model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config)
    with contextlib.suppress(OSError):  # most models have a generation_config.json, none has to
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    return model, files


def _weight_files(folder: str) -> tuple[Path, ...]:
    """The safetensors files that hold the weights, from the hub's cache where ``folder`` is a hub name; or none."""
    found = partial(cached_file, folder, _raise_exceptions_for_missing_entries=False)
    if single := found("model.safetensors"):
        return (Path(single),)
    if index := found("model.safetensors.index.json"):
        names = sorted(set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()))
        return tuple(Path(file) for file in map(found, names) if file is not None)
    return ()


def _loaded_tokenizer(path: str, folder: str, gguf: Mapping[str, str]) -> Any:
    if not gguf and Path(folder).is_dir() and not has_tokenizer(Path(folder)):
        raise UserError(
            f"model.path: {path} holds no tokenizer (none of {', '.join(TOKENIZER_FILES)}): copy the tokenizer's files "
            "there from the model that the weights come from"
        )
    with foreign(f"model.path: no tokenizer could be loaded from {path!r}"):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=NO_CODE, **gguf)


def has_tokenizer(folder: Path) -> bool:
    """Whether ``folder`` holds a tokenizer's files."""
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def _refuse_broken_generation_config(folder: Path) -> None:
    """Raises UserError for a file that is no JSON object; transformers would silently ignore it."""
    file = folder / "generation_config.json"
    if not file.is_file():
        return
    with foreign(f"{file} must hold a JSON object"):
        if not isinstance(json.loads(file.read_text(encoding="utf-8")), dict):
            raise UserError(f"{file} must hold a JSON object")


def _opened_text(model: Any, tokenizer: Any, config: ModelConfig, tags: Sequence[str]) -> TextCodec:
    return open_text(
        tokenizer,
        chat_template=config.chat_template and config.tiny is None,
        stop=config.stop,
        end_ids=end_ids(model),
        tags=tags,
        num_rows=model.get_input_embeddings().weight.shape[0],
    )


def read_shape(config: ModelConfig, vocabulary: Sequence[str], lora: LoraConfig | None = None) -> ModelShape:
    """The sizes of the recipe's model, with adapters if ``lora``, from its config.json: no weights are read.

    A tokenizer in the model's folder is checked as by ``load_policy``. Raises UserError.
    """
    model = _weightless_model(config, vocabulary)
    if config.path is not None and has_tokenizer(Path(os.path.expanduser(config.path))):
        with _located(config.path) as (folder, gguf, _), _about(config.path):
            _opened_text(model, _loaded_tokenizer(config.path, folder, gguf), config, tags=())
    if lora is not None:
        attach(model, lora, seed=0, base=None)
    return shape_of(model)


def read_text(config: ModelConfig, vocabulary: Sequence[str]) -> tuple[TextCodec, int]:
    """The codec of the recipe's model and its number of positions, without reading weights. Raises UserError."""
    model = _weightless_model(config, vocabulary)
    if config.tiny is not None:
        tokenizer: Any = _tiny_tokenizer(config.tiny, vocabulary)
    else:
        assert config.path is not None
        with _located(config.path) as (folder, gguf, _):
            tokenizer = _loaded_tokenizer(config.path, folder, gguf)
    return _opened_text(model, tokenizer, config, tags=()), model.config.max_position_embeddings


def _weightless_model(config: ModelConfig, vocabulary: Sequence[str]) -> Any:
    if config.tiny is not None:
        return _tiny_model(config.tiny, vocabulary, seed=0, dtype=torch.float32)[0]
    assert config.path is not None
    failure = (
        f"model.path: no config.json could be read from {config.path!r} (its folder may hold nothing else for this)"
    )
    with _located(config.path) as (folder, gguf, _), foreign(failure):
        model_config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=NO_CODE, **gguf)
    refuse_unsupported(model_config)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(model_config, attn_implementation=registered_attention())


def shape_of(model: Any) -> ModelShape:
    """The sizes of a loaded model, or of one on the meta device."""
    config = model.config
    adapters = (p for name, p in model.model.layers[0].named_parameters() if ".lora_A." in name)
    return ModelShape(
        num_parameters=sum(p.numel() for p in model.parameters()),
        num_trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
        adapter_rows=sum(len(a_RI) for a_RI in adapters),
        num_layers=config.num_hidden_layers,
        width=config.hidden_size,
        inner=config.intermediate_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=model.model.layers[0].self_attn.head_dim,
        num_vocab=config.vocab_size,
        is_tied=config.tie_word_embeddings,
        normalises_heads=normalises_heads(config),
        normalises_outputs=normalises_outputs(config),
    )


def build_tiny(
    tiny: TinyModel, vocabulary: Sequence[str], *, seed: int, dtype: torch.dtype, device: torch.device
) -> Policy:
    """A Llama decoder of these sizes with random weights, without chat template.

    One token for each word of ``vocabulary``, see ``word_tokenizer``, or for each byte.
    """
    model, tokenizer = _tiny_model(tiny, vocabulary, seed=seed, dtype=dtype)
    return Policy(model.to(device), _opened_text(model, tokenizer, ModelConfig(tiny=tiny), tags=()))


def _tiny_tokenizer(tiny: TinyModel, vocabulary: Sequence[str]) -> Any:
    return byte_tokenizer() if tiny.tokenizer == "bytes" else word_tokenizer(vocabulary)


def _tiny_model(tiny: TinyModel, vocabulary: Sequence[str], *, seed: int, dtype: torch.dtype) -> tuple[Any, Any]:
    """Of type Llama: when a saved Qwen2 is loaded, transformers replaces the tokenizer's splitting by Qwen's own."""
    tokenizer = _tiny_tokenizer(tiny, vocabulary)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=tiny.hidden_size,
        intermediate_size=tiny.intermediate_size,
        num_hidden_layers=tiny.num_layers,
        num_attention_heads=tiny.num_heads,
        num_key_value_heads=tiny.num_kv_heads,
        max_position_embeddings=tiny.max_model_len,
        attention_bias=True,
        tie_word_embeddings=True,
        initializer_range=0.05,  # at width 128 the usual 0.02 learns more slowly
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=registered_attention(), dtype=dtype)
    return model, tokenizer


@contextlib.contextmanager
def _located(path: str) -> Iterator[tuple[str, dict[str, str], list[str]]]:
    """Context for loading from ``path``: a folder or hub name, options for a .gguf file, notes on where it lies."""
    folder, gguf, is_hub_name = _locate(path)
    with contextlib.ExitStack() as stack:
        yield folder, gguf, stack.enter_context(hub_model(folder)) if is_hub_name else []


def _locate(path: str) -> tuple[str, dict[str, str], bool]:
    file = Path(os.path.expanduser(path))  # Path.expanduser raises for an unknown user
    if file.suffix == ".gguf":
        if not file.is_file():
            raise UserError(f"model.path: no such file: {file}")
        return str(file.parent), {"gguf_file": file.name}, False
    looks_local = path.startswith((".", "/", "~")) or file.exists()
    if not looks_local and "/" not in path:  # the hub would be asked many times, for nothing
        raise UserError(
            f"model.path: there is no folder {file.absolute()}, and a name on the Hugging Face hub is OWNER/NAME, got "
            f"{path!r}: write a folder, relative to the working folder or absolute, or such a name"
        )
    if looks_local and not (file / "config.json").is_file():
        raise UserError(f"model.path: {file} must be a folder with a config.json, a .gguf file, or a hub name")
    return str(file) if looks_local else path, {}, not looks_local
