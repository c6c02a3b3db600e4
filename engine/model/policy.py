"""The model that is trained, with its tokenizer and, optionally, LoRA adapters.

The decoder layers are transformers' own (families: engine/model/families.py), but ``Policy`` loops over them itself:
training on packed groups and decoding token by token differ in their attention alone, which the caller passes in.

    hidden = policy.backbone(token_ids, positions, attend)
    attend(layer, q_BHTd, k_BKTd, v_BKTd, scale) -> [B, T, H, d]
"""

import contextlib
import copy
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

from isomorph.engine.model.attention import Attend, attend_packed
from isomorph.engine.model.families import refuse_unsupported, sliding_window
from isomorph.engine.model.layers import fuse_layers
from isomorph.engine.model.lora import Adapters, is_adapter
from isomorph.engine.model.text import TextCodec
from isomorph.engine.types import PackedBatch
from isomorph.kernels import backend
from isomorph.kernels.linear import ROW_MULTIPLE, linear, linear_prepacked, prepack, row_multiple


class _Linear(torch.nn.Linear):
    """The kernels' linear layer. ``Policy`` switches loaded nn.Linear modules to this class in place."""

    prepacked: Tensor | None = None  # the weight in oneDNN's layout, while ``Policy.prepacked`` is open

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
    """Gradient checkpointing: keeps the layer's input alone and recomputes its activations in the backward."""
    run = backend.bound(run)  # autograd may call it on another thread
    # preserve_rng_state: layers use no random numbers
    return checkpoint(run, layer, hidden_BTD, rotary, attend, use_reentrant=False, preserve_rng_state=False)


def _refuse_other_attention(model: Any) -> None:
    """Raises ValueError for a model whose layers would not call ``attend``: packed sequences would see each other."""
    if (found := model.config._attn_implementation) != "isomorph":
        raise ValueError(
            f"the model must be made with attn_implementation='isomorph', got {found!r}; where another model was made "
            "of the policy's configuration, which writes into it: make it of copy.deepcopy(policy.config)"
        )


class Policy:
    """A causal language model: embedding, decoder layers, unembedding, and ``text``, its tokenizer.

    ``model``: transformers' model, loaded with attn_implementation="isomorph"; changed in place. Its parameters may be
    views of the sampler's storage. ``adapters``: LoRA adapters that are already part of ``model``; they alone are then
    trained. ``gradient_checkpointing_every``: n for every n-th layer, None for no layer. ``compiles``: runs each layer
    of the learner's pass through torch.compile. ``device``: where the parameters will be, if they are on the meta
    device now; None: theirs.

    Raises UserError for a model that is not supported.
    """

    def __init__(
        self,
        model: Any,
        text: TextCodec,
        *,
        gradient_checkpointing_every: int | None = None,
        compiles: bool = False,
        adapters: Adapters | None = None,
        device: torch.device | None = None,
    ) -> None:
        refuse_unsupported(model.config)
        _refuse_other_attention(model)
        self.model = model.eval()  # training mode would differ in dropout alone, which no supported model has
        self.adapters = adapters
        for parameter in self.named_parameters().values():
            parameter.requires_grad_(True)
        for module in model.modules():
            if type(module) is torch.nn.Linear:
                module.__class__ = _Linear
        fuse_layers(model)
        self.model.run = MethodType(_run, model)  # FSDP can hook methods of the module only
        self.config = model.config
        self.text = text
        self.notes: tuple[str, ...] = ()  # what ``load_policy`` repaired, one sentence each
        self.unread: tuple[Path, ...] = ()  # files of the weights, where the parameters are on the meta device
        self.device: torch.device = device or self.unembedding.device
        self.dtype: torch.dtype = self.unembedding.dtype  # of the computation; FSDP keeps parameters in float32
        # context: parameters are full tensors while it is open. With FSDP a rank has its shards alone otherwise
        self.unsharded: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
        run = torch.compile(_run_layer, dynamic=True) if compiles else _run_layer
        self._learner_runs: list[RunLayer] = [
            partial(_run_again_in_backward, run)
            if gradient_checkpointing_every and i % gradient_checkpointing_every == 0
            else run
            for i in range(len(model.model.layers))
        ]

    @property
    def unembedding(self) -> Tensor:
        """[V, D]; the embedding itself if the model ties the two."""
        return self.model.lm_head.weight

    @property
    def num_kv_heads(self) -> int:
        return self.config.num_key_value_heads

    @property
    def head_dim(self) -> int:
        return getattr(self.config, "head_dim", None) or self.config.hidden_size // self.config.num_attention_heads

    @property
    def max_model_len(self) -> int:
        """Most tokens of a sequence: the model's positions, or its sliding window where that is shorter."""
        window = sliding_window(self.config)
        return min(self.config.max_position_embeddings, window or self.config.max_position_embeddings)

    def named_parameters(self) -> dict[str, torch.nn.Parameter]:
        """The trained parameters by transformers' names: the adapters if there are any, else all.

        A tied unembedding appears once, under the embedding's name.
        """
        named = self.model.named_parameters()
        return {name: p for name, p in named if self.adapters is None or is_adapter(name)}

    def base(self) -> Mapping[str, Tensor]:
        """The model's weights by the names of transformers and vLLM, without adapters."""
        return self.named_parameters() if self.adapters is None else self.adapters.base()

    def weights(self) -> Mapping[str, Tensor]:
        """The model's weights by the names of transformers and vLLM, with adapters merged in.

        A merged weight is computed each time it is read.
        """
        return self.named_parameters() if self.adapters is None else self.adapters.merged()

    def backbone(self, token_ids_BT: Tensor, positions_BT: Tensor, attend: Attend) -> Tensor:
        """Hidden states [B, T, D] after the last norm, in the policy's dtype; ``attend`` computes the attention."""
        return self._through_layers(token_ids_BT, positions_BT, attend, [_run_layer] * len(self.model.model.layers))

    def _through_layers(
        self, token_ids_BT: Tensor, positions_BT: Tensor, attend: Attend, runs: Sequence[RunLayer]
    ) -> Tensor:
        _refuse_other_attention(self.model)  # it is read at each call, and whoever has the configuration can change it
        return self.model.run(self._decoded, token_ids_BT, positions_BT, attend, runs)

    def _decoded(self, token_ids_BT: Tensor, positions_BT: Tensor, attend: Attend, runs: Sequence[RunLayer]) -> Tensor:
        decoder = self.model.model
        hidden_BTD = decoder.embed_tokens(token_ids_BT)
        rotary = decoder.rotary_emb(hidden_BTD, position_ids=positions_BT)
        for layer, run in zip(decoder.layers, runs, strict=True):
            hidden_BTD = run(layer, hidden_BTD, rotary, attend)
        return decoder.norm(hidden_BTD)

    def hidden(self, batch: PackedBatch) -> Tensor:
        """Hidden states [T, D] of a packed batch after the last norm, in the policy's dtype; differentiable.

        The learner's pass: with the configured gradient checkpointing and compilation.
        """
        num_tok = len(batch.token_ids)
        layout = batch.layout.padded(max(ROW_MULTIPLE, row_multiple(num_tok)))
        token_ids = torch.nn.functional.pad(batch.token_ids, (0, layout.num_tok - num_tok))
        hidden_BTD = self._through_layers(
            token_ids[None], layout.positions[None], attend_packed(layout), self._learner_runs
        )
        return hidden_BTD[0, :num_tok]

    @contextlib.contextmanager
    def borrowed_weights(self, weights: Sequence[Tensor]) -> Iterator[None]:
        """Context: the trained parameters hold ``weights`` (from ``snapshot``); on leaving their own values return.

        Where ``weights`` are those of adapters that add 0, adapters are disabled instead.
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
        """Context: linear layers use oneDNN-prepacked copies of their weights (CPU; elsewhere nothing changes).

        The weights must not change while it is open.
        """
        layers = [module for module in self.model.model.layers.modules() if isinstance(module, _Linear)]
        try:
            for layer in layers:
                layer.prepacked = prepack(layer.weight)
            yield
        finally:
            for layer in layers:
                layer.prepacked = None

    def twin(self) -> "Policy":
        """A policy with own copies of the trained parameters, without gradients; what is frozen is shared."""
        frozen = [t for t in self.model.parameters() if not t.requires_grad]
        twin = copy.copy(self)
        twin.model, twin.adapters = copy.deepcopy((self.model, self.adapters), {id(t): t for t in frozen})
        for parameter in twin.named_parameters().values():
            parameter.requires_grad_(False)
        twin._learner_runs = [_run_layer] * len(twin.model.model.layers)
        return twin

    def snapshot(self) -> list[Tensor]:
        """Copies in host memory of the trained parameters (FSDP: of this rank's shards), ordered as they are named."""
        return [p.to("cpu", copy=True) for p in self._stored()]

    @torch.no_grad()
    def overwrite(self, weights: Sequence[Tensor]) -> None:
        """Copies ``weights`` (from ``snapshot``) into the trained parameters, in place (the sampler may share them)."""
        for parameter, weight in zip(self._stored(), weights, strict=True):
            parameter.copy_(weight)

    @property
    def is_sharded(self) -> bool:
        """Whether FSDP2 has cut the weights."""
        return isinstance(self.model, FSDPModule)

    def stored(self) -> dict[str, Tensor]:
        """The trained parameters by name as this rank stores them, without gradient: with FSDP DTensors in float32."""
        if self.is_sharded:
            self.model.reshard()  # after a pass the parameters may still be the gathered ones
        return {name: p.detach() for name, p in self.named_parameters().items()}

    def _stored(self) -> list[Tensor]:
        """The storage of the trained parameters on this rank; with FSDP of their shards."""
        return [p.to_local() if isinstance(p, DTensor) else p for p in self.stored().values()]

    def save(self, folder: Path) -> None:
        """Writes model and tokenizer as transformers and vLLM load them, with adapters merged into the weights."""
        # safetensors refuses tensors that share storage, hence the copies
        state = {name: w.detach().to("cpu", copy=True).contiguous() for name, w in self.weights().items()}
        self.model.save_pretrained(folder, state_dict=state)
        self.text.tokenizer.save_pretrained(folder)
