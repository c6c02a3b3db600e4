"""The model being trained, and its tokenizer.

A policy is a stack of decoder layers of the Llama family: Llama, Mistral, Qwen2, Qwen3. The layers are transformers'
own; we drive them ourselves, so that the one thing that differs between training on packed groups and decoding token
by token, the attention, is a function handed in from outside:

    hidden = policy.backbone(token_ids, positions, attend)
    attend(layer, q_BHTd, k_BKTd, v_BKTd, scale) -> [B, T, H, d]
"""

import contextlib
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
from isomorph.engine.model.lora import Adapters, is_adapter
from isomorph.engine.model.text import TextCodec
from isomorph.engine.types import PackedBatch
from isomorph.kernels import backend
from isomorph.kernels.linear import ROW_MULTIPLE, linear, linear_prepacked, prepack, row_multiple


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
        refuse_unsupported(model.config)
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
        # a context in which every parameter holds its full tensor; outside of it a rank has its shard, if FSDP is on
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
