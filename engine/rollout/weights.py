"""Maps the trainer's parameters to vLLM's fused tensors, and shares or copies them at each weight sync.

vLLM concatenates the rows of some of the trainer's tensors into one tensor of its own, weights and biases alike:

    q_proj, k_proj, v_proj -> qkv_proj          gate_proj, up_proj -> gate_up_proj

Every other tensor has the same name on both sides; vLLM may pad the embedding with further rows.
``engine/rollout/tripwire.py`` verifies after each sync that both sides hold the same values.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from isomorph.engine.config import UserError
from isomorph.engine.model.policy import Policy
from isomorph.engine.rollout.fingerprint import combine_hashes, storage_fingerprint, tensor_hashes

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
_FUSED_INTO = {part: fused for fused, parts in FUSED.items() for part in parts}


# -- layout
@dataclass(frozen=True, slots=True)
class SamplerTensor:
    """One tensor of the sampler, and the trainer's tensors whose rows it holds, one after the other."""

    name: str  # in the sampler
    parts: tuple[str, ...]  # in the trainer, from the first row on


def sampler_tensors(names: Iterable[str]) -> list[SamplerTensor]:
    """The sampler's tensors for the trainer's ``names``. Raises ValueError if a part of a fused tensor is missing."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(_sampler_name(name), []).append(name)
    return [SamplerTensor(name, _in_order(name, parts)) for name, parts in found.items()]


def split_rows(full: Tensor, target: SamplerTensor, num_rows: Mapping[str, int]) -> dict[str, Tensor]:
    """For each part of ``target`` a view of its rows in ``full``; ``num_rows``: rows of each part.

    A tensor with a single part may have further rows (padding). Raises ValueError if the numbers of rows differ.
    """
    wanted = sum(num_rows[part] for part in target.parts)
    is_padded = len(target.parts) == 1 and full.shape[0] > wanted
    if full.shape[0] != wanted and not is_padded:
        raise ValueError(f"{target.name} must have the {wanted} rows of {', '.join(target.parts)}, got {full.shape[0]}")
    views, start = {}, 0
    for part in target.parts:
        views[part] = full[start : start + num_rows[part]]
        start += num_rows[part]
    return views


def _sampler_name(name: str) -> str:
    *above, module, kind = name.split(".")
    return ".".join([*above, _FUSED_INTO.get(module, module), kind])


def _in_order(name: str, parts: list[str]) -> tuple[str, ...]:
    fused = name.split(".")[-2]
    if fused not in FUSED:
        return tuple(parts)
    by_module = {part.split(".")[-2]: part for part in parts}
    if missing := [module for module in FUSED[fused] if module not in by_module]:
        raise ValueError(f"{name} is made of {', '.join(FUSED[fused])}; the trainer has no {', '.join(missing)}")
    return tuple(by_module[module] for module in FUSED[fused])


# -- ownership
class SharedWeights:
    """Weight sync without copies: the policy's parameters are views of vLLM's tensors.

    Raises UserError where dtype or device differ.
    """

    def __init__(self, model: Any, policy: Policy) -> None:
        self.model, self.policy = model, policy
        views = self._views()
        for name, parameter in policy.named_parameters().items():
            view = views[name]
            if view.dtype != parameter.dtype or view.device != parameter.device:
                raise UserError(
                    f'sampler.publish = "shared" needs one dtype and device; {name} is {parameter.dtype} on '
                    f'{parameter.device}, in vLLM {view.dtype} on {view.device}: use publish = "copy"'
                )
            view.copy_(parameter.detach())
            parameter.data = view  # the Parameter object stays, so references to it stay valid

    def publish(self) -> int:
        """Bytes moved: 0."""
        return 0

    def fingerprint(self) -> str:
        """A hash of addresses: ``storage_fingerprint`` of vLLM's present tensors."""
        return storage_fingerprint(self._views())

    def _views(self) -> dict[str, Tensor]:
        """Read from the model each time, in case vLLM has replaced a tensor."""
        views, prepacked = _pair(self.model, self.policy)
        assert not prepacked, prepacked
        return views


class _Prepacked(NamedTuple):
    """A module of vLLM that keeps a prepacked copy of its weight alone."""

    module: Any
    tensor: SamplerTensor


class CopiedWeights:
    """Weight sync by copying into vLLM's own tensors; on the CPU vLLM's prepacked copies are made again."""

    def __init__(self, model: Any, policy: Policy) -> None:
        self.policy = policy
        self.views, self.prepacked = _pair(model, policy)
        self.prepacked_hashes: dict[str, str] = {}
        lookup_only = {model.model.embed_tokens} - {model.lm_head}
        for module in lookup_only:
            module.cpu_linear = torch.nn.functional.linear  # not called: frees a prepacked copy that nothing uses
        covered = {layer.module for layer in self.prepacked} | lookup_only
        # modules that keep their weight and have a prepacked copy as well: the unembedding
        self.also_prepacked = [m for m in model.modules() if hasattr(m, "cpu_linear") and m not in covered]

    @torch.no_grad()
    def publish(self) -> int:
        """Copies every weight, adapters merged in, to vLLM. Returns the bytes copied."""
        base, weights = self.policy.base(), self.policy.weights()
        merged = self.views.keys() & (self.policy.adapters.weight_names if self.policy.adapters else ())
        plain = self.views.keys() - merged
        torch._foreach_copy_([self.views[name] for name in plain], [base[name].detach() for name in plain])
        for name in merged:  # one matrix at a time: a merged weight is computed when it is read
            self.views[name].copy_(weights[name])
        for layer in self.prepacked:
            self._prepack(layer, [weights[name].detach() for name in layer.tensor.parts])
        for module in self.also_prepacked:
            module.quant_method.process_weights_after_loading(module)
        return sum(p.nbytes for p in self.policy.base().values())

    def fingerprint(self) -> str:
        """A hash of every bit of vLLM's weights; of a prepacked one, of the tensor that was prepacked."""
        own = self.policy.base()
        # vLLM may hold a bias in float32 beside prepacked bfloat16 weights: the conversion back is exact
        views = {name: view.to(own[name].dtype) for name, view in self.views.items()}
        return combine_hashes({**self.prepacked_hashes, **tensor_hashes(views)})

    def _prepack(self, layer: _Prepacked, parts: list[Tensor]) -> None:
        full = torch.cat(parts)
        layer.module.weight = torch.nn.Parameter(full, requires_grad=False)
        num_rows = {name: len(part) for name, part in zip(layer.tensor.parts, parts, strict=True)}
        views = split_rows(full, layer.tensor, num_rows)
        self.prepacked_hashes.update(tensor_hashes(views))
        # prepacks the weight and leaves an empty one
        layer.module.quant_method.process_weights_after_loading(layer.module)


def _pair(model: Any, policy: Policy) -> tuple[dict[str, Tensor], list[_Prepacked]]:
    """Views of vLLM's tensors by the policy's names, and vLLM's modules that hold a prepacked weight alone.

    Raises UserError if the two models do not have the same weights.
    """
    theirs = dict(model.named_parameters())
    num_rows = {name: len(p) for name, p in policy.base().items()}
    wanted = sampler_tensors(num_rows)
    if {target.name for target in wanted} != set(theirs):
        differing = sorted({target.name for target in wanted} ^ set(theirs))
        raise UserError(
            f"vLLM's {type(model).__name__} and the trainer's {type(policy.model).__name__} have different weights "
            f'({", ".join(differing[:4])}, ..), which is not supported: set sampler.kind = "builtin"'
        )
    views: dict[str, Tensor] = {}
    prepacked: list[_Prepacked] = []
    for target in wanted:
        tensor = theirs[target.name].detach()
        if tensor.numel() == 0:
            prepacked.append(_Prepacked(model.get_submodule(target.name.rpartition(".")[0]), target))
            continue
        views.update(split_rows(tensor, target, num_rows))
    return views, prepacked
