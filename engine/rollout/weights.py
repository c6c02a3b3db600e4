"""Whose weights are they: where the trainer's tensors stand in the sampler's, and the proof that both hold the same.

A sampler such as vLLM keeps several of the trainer's tensors one below the other in one tensor of its own:

    q_proj, k_proj, v_proj -> qkv_proj          gate_proj, up_proj -> gate_up_proj          (weights and biases)

Every other tensor stands alone under the trainer's name; the embedding may have padding below its last row.
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
_FUSED_INTO = {part: whole for whole, parts in FUSED.items() for part in parts}


# -- where a tensor stands
@dataclass(frozen=True, slots=True)
class Standing:
    """One tensor of the sampler, and the trainer's tensors that stand in it, one below the other."""

    name: str  # in the sampler
    parts: tuple[str, ...]  # in the trainer, top to bottom


def standings(names: Iterable[str]) -> list[Standing]:
    """Which tensor of the sampler holds which of the trainer's ``names``. Raises ValueError where a part is missing."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(_sampler_name(name), []).append(name)
    return [Standing(name, _in_order(name, parts)) for name, parts in found.items()]


def split_rows(whole: Tensor, standing: Standing, num_rows: Mapping[str, int]) -> dict[str, Tensor]:
    """Views of ``whole``, one for each part. Padding below the last row is legal where one part stands alone.

    Raises ValueError where the rows do not fit.
    """
    wanted = sum(num_rows[part] for part in standing.parts)
    is_padded = len(standing.parts) == 1 and whole.shape[0] > wanted
    if whole.shape[0] != wanted and not is_padded:
        raise ValueError(
            f"{standing.name} must have the {wanted} rows of {', '.join(standing.parts)}, got {whole.shape[0]}"
        )
    views, start = {}, 0
    for part in standing.parts:
        views[part] = whole[start : start + num_rows[part]]
        start += num_rows[part]
    return views


def _sampler_name(name: str) -> str:
    *above, module, kind = name.split(".")
    return ".".join([*above, _FUSED_INTO.get(module, module), kind])


def _in_order(name: str, parts: list[str]) -> tuple[str, ...]:
    whole = name.split(".")[-2]
    if whole not in FUSED:
        return tuple(parts)
    by_module = {part.split(".")[-2]: part for part in parts}
    if missing := [module for module in FUSED[whole] if module not in by_module]:
        raise ValueError(f"{name} is made of {', '.join(FUSED[whole])}; the trainer has no {', '.join(missing)}")
    return tuple(by_module[module] for module in FUSED[whole])


# -- whose storage
class SharedWeights:
    """The policy's parameters view vLLM's tensors."""

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
            parameter.data = view  # the same Parameter: whoever holds it goes on

    def publish(self) -> int:
        return 0

    def fingerprint(self) -> str:
        return storage_fingerprint(self._views())

    def _views(self) -> dict[str, Tensor]:
        """Of the tensors that vLLM holds now: it may have taken others."""
        views, packs = _pair(self.model, self.policy)
        assert not packs, packs
        return views


class _Pack(NamedTuple):
    """A module whose weight exists as a packed copy only."""

    module: Any
    standing: Standing


class CopiedWeights:
    """vLLM has its own tensors, and on the CPU packed copies of them."""

    def __init__(self, model: Any, policy: Policy) -> None:
        self.policy = policy
        self.views, self.packs = _pair(model, policy)
        self.pack_hashes: dict[str, str] = {}
        lookup_only = {model.model.embed_tokens} - {model.lm_head}
        for module in lookup_only:
            module.cpu_linear = torch.nn.functional.linear  # never called: vLLM's pack of it is a waste
        packed = {pack.module for pack in self.packs} | lookup_only
        # these keep their weight and may have a pack of it as well: the unembedding
        self.half_packed = [m for m in model.modules() if hasattr(m, "cpu_linear") and m not in packed]

    @torch.no_grad()
    def publish(self) -> int:
        base, weights = self.policy.base(), self.policy.weights()
        merged = self.views.keys() & (self.policy.adapters.weight_names if self.policy.adapters else ())
        plain = self.views.keys() - merged
        torch._foreach_copy_([self.views[name] for name in plain], [base[name].detach() for name in plain])
        for name in merged:  # a matrix at a time
            self.views[name].copy_(weights[name])
        for pack in self.packs:
            self._pack_again(pack, [weights[name].detach() for name in pack.standing.parts])
        for module in self.half_packed:
            module.quant_method.process_weights_after_loading(module)
        return sum(p.nbytes for p in self.policy.base().values())

    def fingerprint(self) -> str:
        own = self.policy.base()
        # a bias may be held in float32 beside packed bfloat16 weights: the same number
        views = {name: view.to(own[name].dtype) for name, view in self.views.items()}
        return combine_hashes({**self.pack_hashes, **tensor_hashes(views)})

    def _pack_again(self, pack: _Pack, parts: list[Tensor]) -> None:
        whole = torch.cat(parts)
        pack.module.weight = torch.nn.Parameter(whole, requires_grad=False)
        num_rows = {name: len(part) for name, part in zip(pack.standing.parts, parts, strict=True)}
        views = split_rows(whole, pack.standing, num_rows)
        self.pack_hashes.update(tensor_hashes(views))
        pack.module.quant_method.process_weights_after_loading(pack.module)  # leaves an empty weight behind


def _pair(model: Any, policy: Policy) -> tuple[dict[str, Tensor], list[_Pack]]:
    """For each of the policy's tensors its view in vLLM's, or the module that packed it. Raises UserError."""
    theirs = dict(model.named_parameters())
    num_rows = {name: len(p) for name, p in policy.base().items()}
    wanted = standings(num_rows)
    if {standing.name for standing in wanted} != set(theirs):
        differing = sorted({standing.name for standing in wanted} ^ set(theirs))
        raise UserError(
            f"vLLM's {type(model).__name__} and the trainer's {type(policy.model).__name__} name their weights "
            f'differently ({", ".join(differing[:4])}, ..): sample with sampler.kind = "builtin"'
        )
    views: dict[str, Tensor] = {}
    packs: list[_Pack] = []
    for standing in wanted:
        tensor = theirs[standing.name].detach()
        if tensor.numel() == 0:
            packs.append(_Pack(model.get_submodule(standing.name.rpartition(".")[0]), standing))
            continue
        views.update(split_rows(tensor, standing, num_rows))
    return views, packs
