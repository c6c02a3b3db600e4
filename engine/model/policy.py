"""The model being trained, and its tokenizer. The only file that imports transformers.

A policy is a stack of decoder layers of the Llama family: Llama, Mistral, Qwen2, Qwen3. The layers are transformers'
own; we drive them ourselves, so that the one thing that differs between training on packed groups and decoding token
by token, the attention, is a function handed in from outside:

    hidden = policy.backbone(token_ids, positions, attend)
    attend(layer, q_BHTd, k_BKTd, v_BKTd, scale) -> [B, T, H, d]
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

os.environ.setdefault(
    "TOKENIZERS_PARALLELISM", "false"
)  # its thread pool does not survive the fork of a judge's worker

import transformers
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from isomorph.engine.config import LoraConfig, ModelConfig, TinyModel, UserError
from isomorph.engine.foreign import foreign
from isomorph.engine.model.check import (
    end_ids,
    limit_to_window,
    mend_generation_config,
    rehearse_saving,
    sliding_window,
    untie,
)
from isomorph.engine.model.lora import Adapters, attach, is_adapter, require_peft
from isomorph.engine.model.text import TextCodec, open_text
from isomorph.engine.planner import ModelShape
from isomorph.engine.types import PackedBatch
from isomorph.kernels import backend
from isomorph.kernels.linear import ROW_MULTIPLE, linear, linear_prepacked, prepack, row_multiple
from isomorph.kernels.packed_attention import PackedLayout, packed_attention

Attend = Callable[[int, Tensor, Tensor, Tensor, float], Tensor]

# model_type -> seen with this interface in tests/engine/test_policy.py
SUPPORTED = ("llama", "mistral", "qwen2", "qwen3")
WORD = r"</?[a-z]+>|[A-Za-z]+|\d+|[^\sA-Za-z\d]"  # a tag, a word, a number or a sign: one token each
# of which a folder with a tokenizer has at least one
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tokenizer_config.json")
SPECIAL = PAD, EOS, BOS, UNK = "[PAD]", "[EOS]", "[BOS]", "[UNK]"


@torch.compiler.disable  # it knows its layer by number: compiled, each layer would be compiled by itself
def _attend_from_outside(
    module: Any, q: Tensor, k: Tensor, v: Tensor, mask: None, *, scaling: float, attend: Attend, **_: Any
) -> tuple[Tensor, None]:
    """The attention function that the layers call; ``attend`` comes down from ``Policy.backbone``."""
    return attend(module.layer_idx, q, k, v, scaling), None


def _attend_from_outside_or_sdpa(
    module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, attend: Attend | None = None, **options: Any
) -> tuple[Tensor, None]:
    if attend is not None:
        return _attend_from_outside(module, q, k, v, None, attend=attend, **options)
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, q, k, v, mask, **options)


ALL_ATTENTION_FUNCTIONS.register("isomorph", _attend_from_outside)
ALL_ATTENTION_FUNCTIONS.register("isomorph_or_sdpa", _attend_from_outside_or_sdpa)
ALL_MASK_ATTENTION_FUNCTIONS.register("isomorph_or_sdpa", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


def attend_packed(layout: PackedLayout) -> Attend:
    """For one packed batch, B = 1, of this layout."""

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        q_THd, k_TKd, v_TKd = (x[0].transpose(0, 1) for x in (q, k, v))
        return packed_attention(q_THd, k_TKd, v_TKd, layout, scale=scale)[None]

    return attend


class _Linear(torch.nn.Linear):
    """A layer that is there already takes this class: its parameters and their names stay."""

    prepacked: Tensor | None = None

    def forward(self, input: Tensor) -> Tensor:
        if self.prepacked is not None:
            return linear_prepacked(input, self.prepacked, self.bias)
        return linear(input, self.weight, self.bias)


def _run(model: Any, decode: Callable[..., Tensor], *arguments: Any) -> Tensor:
    return decode(*arguments)


RunLayer = Callable[[Any, Tensor, tuple[Tensor, Tensor], Attend], Tensor]


def _run_layer(layer: Any, hidden_BTD: Tensor, rotary: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
    return layer(hidden_BTD, position_embeddings=rotary, attend=attend)


def _run_again_in_backward(
    run: RunLayer, layer: Any, hidden_BTD: Tensor, rotary: tuple[Tensor, Tensor], attend: Attend
) -> Tensor:
    """Keeps the layer's input alone; its other activations are made again when their gradients are."""
    # nothing here draws random numbers
    run = backend.bound(run)  # autograd may call it on another thread
    return checkpoint(run, layer, hidden_BTD, rotary, attend, use_reentrant=False, preserve_rng_state=False)


class Policy:
    """Decoder layers, embedding and unembedding; the parameters may be views of another owner's storage.

    With ``adapters``, which are part of ``model`` already, they alone are trained.
    """

    def __init__(
        self,
        model: Any,
        text: TextCodec,
        *,
        gradient_checkpointing_every: int | None = None,
        compiles: bool = False,
        adapters: Adapters | None = None,
    ) -> None:
        _refuse_what_we_cannot_train(model.config)
        if model.config._attn_implementation != "isomorph":  # it would never call ``attend``
            raise ValueError(
                f"the model must be made with attn_implementation='isomorph', got {model.config._attn_implementation!r}"
            )
        self.model = model.eval()  # these decoders have no dropout, and nothing else differs
        self.adapters = adapters
        for parameter in self.named_parameters().values():
            parameter.requires_grad_(True)
        for module in model.modules():
            if type(module) is torch.nn.Linear:
                module.__class__ = _Linear
        self.model.run = MethodType(_run, model)  # FSDP gathers what a pass needs around the model's own methods
        self.config = model.config
        self.text = text
        self.notes: tuple[str, ...] = ()  # what was mended when the model was loaded
        self.device: torch.device = self.unembedding.device
        self.dtype: torch.dtype = self.unembedding.dtype  # that the model computes in
        # while open every parameter is here in full; of a model that FSDP has cut only then
        self.whole: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
        run = torch.compile(_run_layer, dynamic=True) if compiles else _run_layer
        self._learner_runs: list[RunLayer] = [
            partial(_run_again_in_backward, run)
            if gradient_checkpointing_every and i % gradient_checkpointing_every == 0
            else run
            for i in range(len(model.model.layers))
        ]

    @property
    def unembedding(self) -> Tensor:
        """[V, D]; the same tensor as the embedding where the model ties them."""
        return self.model.lm_head.weight

    @property
    def num_kv_heads(self) -> int:
        return self.config.num_key_value_heads

    @property
    def head_dim(self) -> int:
        return getattr(self.config, "head_dim", None) or self.config.hidden_size // self.config.num_attention_heads

    @property
    def max_model_len(self) -> int:
        """The longest sequence the positions were made for, and that no sliding window cuts."""
        window = sliding_window(self.config)
        return min(self.config.max_position_embeddings, window or self.config.max_position_embeddings)

    def named_parameters(self) -> dict[str, torch.nn.Parameter]:
        """All that is trained, once: a tied unembedding stands under the embedding's name; adapters stand alone."""
        named = self.model.named_parameters()
        return {name: p for name, p in named if self.adapters is None or is_adapter(name)}

    def base(self) -> Mapping[str, Tensor]:
        """The parameters by the names of transformers and vLLM, without what adapters add."""
        return self.named_parameters() if self.adapters is None else self.adapters.base()

    def weights(self) -> Mapping[str, Tensor]:
        """What a model without adapters computes the same with, by the names of transformers and vLLM.

        A weight with an adapter is made anew each time it is read.
        """
        return self.named_parameters() if self.adapters is None else self.adapters.merged()

    def backbone(self, token_ids_BT: Tensor, positions_BT: Tensor, attend: Attend) -> Tensor:
        """[B, T, D] hidden rows after the last norm."""
        return self._through_layers(token_ids_BT, positions_BT, attend, [_run_layer] * len(self.model.model.layers))

    def _through_layers(
        self, token_ids_BT: Tensor, positions_BT: Tensor, attend: Attend, runs: Sequence[RunLayer]
    ) -> Tensor:
        return self.model.run(self._decoded, token_ids_BT, positions_BT, attend, runs)

    def _decoded(self, token_ids_BT: Tensor, positions_BT: Tensor, attend: Attend, runs: Sequence[RunLayer]) -> Tensor:
        decoder = self.model.model
        hidden_BTD = decoder.embed_tokens(token_ids_BT)
        rotary = decoder.rotary_emb(hidden_BTD, position_ids=positions_BT)
        for layer, run in zip(decoder.layers, runs, strict=True):
            hidden_BTD = run(layer, hidden_BTD, rotary, attend)
        return decoder.norm(hidden_BTD)

    def hidden(self, batch: PackedBatch) -> Tensor:
        """[T, D] hidden rows of a packed batch, the learner's way: layers compiled and recomputed as configured."""
        num_tok = len(batch.token_ids)
        layout = batch.layout.padded(max(ROW_MULTIPLE, row_multiple(num_tok)))
        token_ids = torch.nn.functional.pad(batch.token_ids, (0, layout.num_tok - num_tok))
        hidden_BTD = self._through_layers(
            token_ids[None], layout.positions[None], attend_packed(layout), self._learner_runs
        )
        return hidden_BTD[0, :num_tok]

    @contextlib.contextmanager
    def borrowed_weights(self, weights: Sequence[Tensor]) -> Iterator[None]:
        """While open the parameters hold ``weights`` (of ``snapshot``); afterwards their own values, bit for bit.

        Adapters that would add 0 are left out of the computation instead.
        """
        if self.adapters is not None and self.adapters.are_idle(
            dict(zip(self.named_parameters(), weights, strict=True))
        ):
            with self.adapters.disabled():
                yield
            return
        own = self.snapshot()
        self.overwrite(weights)
        try:
            yield
        finally:
            self.overwrite(own)

    @contextlib.contextmanager
    def prepacked(self) -> Iterator[None]:
        """While open the layers multiply by packed copies of their weights, which must stay as they are: on a CPU."""
        layers = [module for module in self.model.model.layers.modules() if isinstance(module, _Linear)]
        try:
            for layer in layers:
                layer.prepacked = prepack(layer.weight)
            yield
        finally:
            for layer in layers:
                layer.prepacked = None

    def snapshot(self) -> list[Tensor]:
        """A copy of what is trained in host memory, in the order of ``named_parameters``; of what FSDP left here."""
        return [p.to("cpu", copy=True) for p in self._stored()]

    @torch.no_grad()
    def overwrite(self, weights: Sequence[Tensor]) -> None:
        """In place, so that whoever shares the storage sees the new values."""
        for parameter, weight in zip(self._stored(), weights, strict=True):
            parameter.copy_(weight)

    def _stored(self) -> list[Tensor]:
        """The parameters' storage on this rank."""
        if isinstance(self.model, FSDPModule):
            self.model.reshard()  # what a pass has gathered would hide it
        parameters = (p.detach() for p in self.named_parameters().values())
        return [p.to_local() if isinstance(p, DTensor) else p for p in parameters]

    def save(self, folder: Path) -> None:
        """As transformers and vLLM load it, adapters merged into the weights.

        The copies undo any sharing of storage, which the format cannot express.
        """
        state = {name: w.detach().to("cpu", copy=True).contiguous() for name, w in self.weights().items()}
        self.model.save_pretrained(folder, state_dict=state)
        self.text.tokenizer.save_pretrained(folder)


def let_attend(model: Any) -> None:
    """Another trainer's model: ``model(..., attend=...)`` attends by ``attend`` from now on, and as before without it.

    Raises UserError for a model whose attention, positions or dropout ours does not know.
    """
    _refuse_what_we_cannot_train(model.config)
    if (window := sliding_window(model.config)) and window < model.config.max_position_embeddings:
        raise UserError(
            f"sliding-window attention over {window} tokens is not supported here: packed attention sees the whole "
            "prompt, and this trainer's sequences may be longer"
        )
    if (loaded := model.config._attn_implementation) not in ("sdpa", "isomorph_or_sdpa"):
        raise UserError(f"the model must have been loaded with attn_implementation='sdpa', got {loaded!r}")
    model.config._attn_implementation = "isomorph_or_sdpa"


def silence_loaders() -> None:
    """No progress bars of transformers between the lines of a run; its warnings stay."""
    transformers.utils.logging.disable_progress_bar()


def load_policy(
    config: ModelConfig,
    *,
    vocabulary: Sequence[str],
    seed: int,
    device: torch.device,
    lora: LoraConfig | None = None,
    tags: Sequence[str] = (),
) -> Policy:
    """The policy that the recipe names, after model, tokenizer, chat template and what saving needs have been checked
    against each other; ``Policy.notes`` says what was mended.

    ``vocabulary``: the words of a tiny model. ``tags``: what stands around an answer and must survive decoding.
    Raises UserError.
    """
    if lora is not None:
        require_peft()  # before weights are read for nothing
    dtype = getattr(torch, config.dtype)
    if config.tiny is not None:
        model, tokenizer = _tiny_model(config.tiny, vocabulary, seed=seed, dtype=dtype)
        text, notes = _opened_text(model, tokenizer, config, tags), []
    else:
        assert config.path is not None
        model, tokenizer = _loaded_model(config.path, dtype)
        with _about(config.path):
            notes = untie(model) + limit_to_window(model)
            text = _opened_text(model, tokenizer, config, tags)
            notes += mend_generation_config(model, text)
            rehearse_saving(model, tokenizer)
    adapters = None if lora is None else attach(model, lora, seed=seed, base=config.path)
    gradient_checkpointing_every, compiles = config.gradient_checkpointing_every, config.compile
    policy = Policy(
        model.to(device),
        text,
        gradient_checkpointing_every=gradient_checkpointing_every,
        compiles=compiles,
        adapters=adapters,
    )
    policy.notes = (*notes, *text.notes)
    return policy


@contextlib.contextmanager
def _about(path: str) -> Iterator[None]:
    """Says in a UserError which model it is about."""
    try:
        yield
    except UserError as error:
        raise UserError(f"model.path: {path}: {error}") from error


def _loaded_model(path: str, dtype: torch.dtype) -> tuple[Any, Any]:
    folder, gguf = _locate(path)
    tokenizer = _loaded_tokenizer(path, folder, gguf)
    loader_options = dict(gguf, quantization_config=transformers.GgufConfig(dequantize=True)) if gguf else {}
    with foreign(f"model.path: no model could be loaded from {path!r}"):
        _refuse_broken_generation_config(Path(folder))
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation="isomorph", output_loading_info=True, **loader_options
        )
    model, loading = loaded
    if missing := sorted(loading["missing_keys"]):  # transformers would train random numbers in their place
        raise UserError(
            f"model.path: the weights in {path!r} lack {len(missing)} tensors of a {model.config.model_type}, "
            f"the first is {missing[0]}"
        )
    model.config._attn_implementation = "isomorph"
    return model, tokenizer


def _loaded_tokenizer(path: str, folder: str, gguf: Mapping[str, str]) -> Any:
    if not gguf and Path(folder).is_dir() and not has_tokenizer(Path(folder)):
        raise UserError(
            f"model.path: {path} holds no tokenizer, none of {', '.join(TOKENIZER_FILES)}: copy the tokenizer's files "
            "there from the model that the weights come from"
        )
    with foreign(f"model.path: no tokenizer could be loaded from {path!r}"):
        return AutoTokenizer.from_pretrained(folder, **gguf)


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def _refuse_broken_generation_config(folder: Path) -> None:
    """transformers would go on without it and say nothing."""
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
    """The sizes of the recipe's model, from its config alone: no weights are read. Raises UserError.

    A tokenizer in the model's folder is checked as ``load_policy`` does.
    """
    model = _weightless_model(config, vocabulary)
    if config.path is not None and has_tokenizer(Path(config.path).expanduser()):
        folder, gguf = _locate(config.path)
        with _about(config.path):
            _opened_text(model, _loaded_tokenizer(config.path, folder, gguf), config, tags=())
    if lora is not None:
        attach(model, lora, seed=0, base=None)
    return shape_of(model)


def _weightless_model(config: ModelConfig, vocabulary: Sequence[str]) -> Any:
    if config.tiny is not None:
        return _tiny_model(config.tiny, vocabulary, seed=0, dtype=torch.float32)[0]
    assert config.path is not None
    folder, gguf = _locate(config.path)
    with foreign(
        f"model.path: no config could be read from {config.path!r} (a folder with nothing but the model's config.json "
        "is enough here)"
    ):
        model_config = transformers.AutoConfig.from_pretrained(folder, **gguf)
    _refuse_what_we_cannot_train(model_config)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(model_config, attn_implementation="isomorph")


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
        normalises_heads=config.model_type == "qwen3",
    )


def build_tiny(
    tiny: TinyModel, vocabulary: Sequence[str], *, seed: int, dtype: torch.dtype, device: torch.device
) -> Policy:
    """A small Llama decoder with random weights over a vocabulary of whole words."""
    model, tokenizer = _tiny_model(tiny, vocabulary, seed=seed, dtype=dtype)
    return Policy(model.to(device), _opened_text(model, tokenizer, ModelConfig(tiny=tiny), tags=()))


def _tiny_model(tiny: TinyModel, vocabulary: Sequence[str], *, seed: int, dtype: torch.dtype) -> tuple[Any, Any]:
    """Not a Qwen2: to that type transformers gives Qwen's own splitting into words, whatever its tokenizer says."""
    tokenizer = word_tokenizer(vocabulary)
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
        model = AutoModelForCausalLM.from_config(config, attn_implementation="isomorph", dtype=dtype)
    return model, tokenizer


def word_tokenizer(vocabulary: Sequence[str]) -> PreTrainedTokenizerFast:
    """One token a word, number, tag or sign; what is not in the vocabulary is [UNK]."""
    words = [*SPECIAL, *vocabulary]
    if len(set(words)) != len(words):
        raise ValueError("vocabulary must hold each word once, and none of [PAD] [EOS] [BOS] [UNK]")
    table = {word: index for index, word in enumerate(words)}
    inner = Tokenizer(models.WordLevel(table, unk_token=UNK))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(WORD), behavior="removed", invert=True)
    inner.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, table[BOS])])
    # no decoder: tokens are then joined with spaces
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token=PAD, eos_token=EOS, bos_token=BOS, unk_token=UNK)


def _locate(path: str) -> tuple[str, dict[str, str]]:
    file = Path(path).expanduser()
    if file.suffix == ".gguf":
        if not file.is_file():
            raise UserError(f"model.path: no such file: {file}")
        return str(file.parent), {"gguf_file": file.name}
    looks_local = path.startswith((".", "/", "~")) or file.exists()
    if looks_local and not (file / "config.json").is_file():
        raise UserError(f"model.path: {file} must be a folder with a config.json, a .gguf file, or a hub name")
    return str(file) if looks_local else path, {}


def _refuse_what_we_cannot_train(config: Any) -> None:
    if config.model_type not in SUPPORTED:
        raise UserError(f"model type {config.model_type!r} is not supported; supported are {', '.join(SUPPORTED)}")
    layer_types = set(getattr(config, "layer_types", None) or ["full_attention"])
    if unknown := sorted(layer_types - {"full_attention", "sliding_attention"}):
        raise UserError(f"layers of type {unknown[0]!r} are not supported: packed attention sees the whole prompt")
    rope_type = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope_type in ("dynamic", "longrope"):
        raise UserError(f"rope_type {rope_type!r} is not supported: its angles depend on the batch's longest sequence")
    if getattr(config, "attention_dropout", 0.0):
        raise UserError(f"attention_dropout must be 0, got {config.attention_dropout}")
