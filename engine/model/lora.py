"""LoRA (arXiv 2106.09685): low-rank adapters are trained instead of the weights. The only file that imports peft.

    layer(x) = W x + scale * B (A x)        scale = alpha / rank        B = 0 at first: exactly the base model

W is frozen. A [rank, in] and B [out, rank] have W's dtype; the optimizer keeps float32 masters of them, as of every
trained parameter. vLLM and the saved model take no adapters; they get merged weights,

    W' = W + scale * B A                    computed in float32, rounded once to the dtype of W

one matrix at a time, so that there is never a second copy of the model.
"""

import contextlib
import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from isomorph.engine.config import LoraConfig, UserError
from isomorph.engine.foreign import foreign

NAME = "default"  # peft's name for the one set of adapters


def require_peft() -> None:
    """Raises UserError where peft is not installed."""
    if importlib.util.find_spec("peft") is None:
        raise UserError('[lora] needs the package peft: pip install "isomorph[lora]"')


def attach(model: Any, config: LoraConfig, *, seed: int, base: str | None) -> "Adapters":
    """Adds adapters to ``config.targets`` (default: all linear layers of the decoder), in place, and freezes all else.

    ``seed``: of the random A. ``base``: the path of the base model, written into adapter_config.json. Raises UserError
    where peft is missing, a target is no linear layer of the decoder, or peft refuses.
    """
    require_peft()
    import peft  # takes seconds

    names = linear_names(model)
    targets = config.targets or names
    if unknown := [target for target in targets if target not in names]:
        raise UserError(f"lora.targets must be linear layers of the decoder: {', '.join(names)}; got {unknown[0]!r}")
    peft_config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # peft divides it, and says int
        target_modules=list(targets),
        base_model_name_or_path=base,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        with foreign("[lora]: peft could not add adapters to the model"):
            peft.inject_adapter_in_model(peft_config, model)
    return Adapters(model, peft_config)


def linear_names(model: Any) -> list[str]:
    """The names of the linear layers in a decoder layer, such as q_proj."""
    modules = model.model.layers[0].named_modules()
    return [name.rpartition(".")[2] for name, module in modules if isinstance(module, torch.nn.Linear)]


def is_adapter(name: str) -> bool:
    """Whether ``name`` is that of an adapter's parameter, an A or a B."""
    return f".{NAME}." in name


class Adapters:
    """The adapters of a model; ``attach`` makes them."""

    def __init__(self, model: Any, config: Any) -> None:
        self.model, self.config = model, config
        self.layers: dict[str, Any] = {n: m for n, m in model.named_modules() if hasattr(m, "base_layer")}

    def base(self) -> dict[str, Tensor]:
        """The frozen weights, by their names in a model without adapters."""
        named = self.model.named_parameters()
        return {name.replace(".base_layer.", "."): p for name, p in named if not is_adapter(name)}

    @property
    def weight_names(self) -> set[str]:
        """The names of the weights that have adapters."""
        return {f"{name}.weight" for name in self.layers}

    def merged(self) -> "Merged":
        """The weights with adapters merged in, by their names in a model without adapters."""
        return Merged(self)

    def are_idle(self, weights: Mapping[str, Tensor]) -> bool:
        """Whether the adapters add 0 with these values of A and B, because every B is 0."""
        return not any(weight.any() for name, weight in weights.items() if ".lora_B." in name)

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Context: the model computes without its adapters."""
        for layer in self.layers.values():
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in self.layers.values():
                layer.enable_adapters(True)

    def save(self, folder: Path) -> None:
        """Writes the adapters as ``peft.PeftModel.from_pretrained(base, folder)`` loads them."""
        folder.mkdir(parents=True, exist_ok=True)
        named = ((n, p.detach()) for n, p in self.model.named_parameters() if is_adapter(n))
        state = {f"base_model.model.{n.replace(f'.{NAME}.', '.')}": p.to("cpu", copy=True) for n, p in named}
        save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        self.config.save_pretrained(folder)


class Merged(Mapping[str, Tensor]):
    """Weights by name, with adapters merged in: W' is computed at each access and not kept."""

    def __init__(self, adapters: Adapters) -> None:
        self._base = adapters.base()
        self._layers = {f"{name}.weight": layer for name, layer in adapters.layers.items()}

    def __iter__(self) -> Iterator[str]:
        return iter(self._base)

    def __len__(self) -> int:
        return len(self._base)

    def __getitem__(self, name: str) -> Tensor:
        weight_OI = self._base[name].detach()
        return _merge(weight_OI, self._layers[name]) if name in self._layers else weight_OI


@torch.no_grad()
def _merge(weight_OI: Tensor, layer: Any) -> Tensor:
    wide = torch.promote_types(weight_OI.dtype, torch.float32)
    a_RI, b_OR = (module[NAME].weight.to(wide) for module in (layer.lora_A, layer.lora_B))
    return torch.add(weight_OI.to(wide), b_OR @ a_RI, alpha=layer.scaling[NAME]).to(weight_OI.dtype)
