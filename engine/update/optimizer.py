"""AdamW with float32 master weights: the step is computed in float32, then rounded into the parameters in place.

At a learning rate of 1e-6 almost every change of a bfloat16 weight is smaller than its spacing, so it would be lost
without a master. Float32 parameters (and, in tests, float64 ones) are their own masters.

With ``model.offload_optimizer`` (as ZeRO-Offload, arXiv 2101.06840) masters, moments and accumulated gradients are in
host memory, 16 bytes a weight: gradients are copied there while the last backward pass computes (host_gradients.py),
PyTorch's fused CPU AdamW makes the step, and the rounded weights are copied back. The arithmetic is the same. torchao
0.18 has a similar optimizer, but without separate masters, and its 8-bit moments are tensor subclasses that are
compiled for each shape.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Parameter
from torch.utils.hooks import RemovableHandle

from isomorph.engine.config import OptimConfig
from isomorph.engine.distributed.fsdp import full_tensor, local_shard, shard_like
from isomorph.engine.types import RunFailed
from isomorph.engine.update.host_gradients import HostGradients, own_gradient
from isomorph.engine.update.not_finite import origin_in_gradient


class MasterAdamW:
    """Owns master weights, moments and gradient accumulators of ``parameters``.

    The gradient of a bfloat16 parameter is added to a float32 accumulator as soon as autograd has computed it, so that
    sums over micro-batches are not rounded to bfloat16.
    """

    def __init__(self, parameters: Mapping[str, Parameter], config: OptimConfig, *, on_host: bool = False) -> None:
        self.parameters = dict(parameters)
        make = _host_master if on_host else _master
        self.masters = {name: make(p) for name, p in self.parameters.items()}
        matrices = [master for master in self.masters.values() if master.ndim > 1]
        vectors = [master for master in self.masters.values() if master.ndim <= 1]  # norms and biases
        self.adamw = torch.optim.AdamW(
            [{"params": params, "is_vector": params is vectors} for params in (matrices, vectors) if params],
            lr=config.lr,
            fused=True,
        )
        self.configure(config)
        self._host = HostGradients(self.parameters, self.masters) if on_host else None
        self._hooks = self._host.hooks if self._host is not None else self._accumulators()

    def configure(self, config: OptimConfig) -> None:
        """Sets the hyperparameters of another stage and keeps the moments."""
        for group in self.adamw.param_groups:
            is_decayed = config.decay_norms_and_biases or not group["is_vector"]
            weight_decay = config.weight_decay if is_decayed else 0.0
            group.update(betas=config.betas, eps=config.eps, weight_decay=weight_decay)

    def reset(self, config: OptimConfig) -> None:
        """Sets the hyperparameters of another stage and clears the moments; keeps the float32 master weights."""
        self.adamw.state.clear()
        self.configure(config)

    def _accumulators(self) -> list[RemovableHandle]:
        return [
            p.register_post_accumulate_grad_hook(_accumulator(self.masters[name]))
            for name, p in self.parameters.items()
            if self.masters[name] is not p
        ]

    def last_batch(self) -> None:
        """Before the last backward pass of a step: gradients for masters in host memory move while it computes.

        Without this call they move when they are asked for.
        """
        if self._host is not None:
            self._host.last_batch()

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def gradients(self) -> list[Tensor]:
        """Returns the accumulated gradients of the masters; they may be changed in place."""
        if self._host is not None:
            self._host.wait()
        return [master.grad for master in self.masters.values() if master.grad is not None]

    def zero_grad(self) -> None:
        if self._host is not None:
            self._host.discard()
        self.adamw.zero_grad(set_to_none=True)

    @torch.no_grad()
    def step(self, *, lr: float, clip_norm: float | None) -> float:
        """Makes one step; returns the norm of the whole gradient before clipping. ``clip_norm`` None: not clipped.

        Raises RunFailed if the norm is not finite; nothing has changed then.
        """
        total = full_tensor(torch.nn.utils.get_total_norm(self.gradients()))
        norm = total.item()
        if not math.isfinite(norm):
            raise RunFailed(
                f"the norm of the gradient must be finite, got {norm}: {origin_in_gradient(self.masters)}; the weights "
                "are unchanged: lower optim.lr and start again, or check the rewards"
            )
        if clip_norm is not None and norm > clip_norm:  # else a pass over all gradients would multiply them by 1
            factor = (clip_norm / (total + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_([local_shard(gradient) for gradient in self.gradients()], factor)
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.step()
        rounded = [(p, self.masters[name]) for name, p in self.parameters.items() if self.masters[name] is not p]
        if rounded:
            torch._foreach_copy_([p for p, _ in rounded], [master for _, master in rounded])
        return norm

    def state_tensors(self) -> dict[str, Tensor]:
        """Returns masters and moments by name, for a checkpoint; with FSDP DTensors, whose masters are the weights."""
        tensors = {f"master/{name}": master for name, master in self.masters.items() if self._is_apart(name)}
        for name, master in self.masters.items():
            for key, value in self.adamw.state.get(master, {}).items():
                tensors[f"{key}/{name}"] = value
        return tensors

    @torch.no_grad()
    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        for name, master in self.masters.items():
            if self._is_apart(name):
                master.copy_(shard_like(tensors[f"master/{name}"], master))
            if f"step/{name}" not in tensors:
                continue
            moments = {key: _taken(tensors[f"{key}/{name}"], master) for key in ("exp_avg", "exp_avg_sq")}
            state = {"step": tensors[f"step/{name}"].clone(), **moments}
            self.adamw.state[master] = {key: value.to(master.device) for key, value in state.items()}

    def _is_apart(self, name: str) -> bool:
        """Whether the master is another tensor than the weight, and must be saved beside it."""
        return self.masters[name] is not self.parameters[name]


def learning_rate(config: OptimConfig, step: int, num_steps: int) -> float:
    """Learning rate after ``step`` completed steps of a stage of ``num_steps``: linear warm-up times the schedule."""
    num_warm = config.warmup_steps or math.ceil(config.warmup_share * num_steps)
    warm = min(1.0, (step + 1) / num_warm) if num_warm else 1.0
    done = step / num_steps
    shape = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[config.schedule]
    floor = 1.0 if config.schedule == "constant" else config.final_lr_frac
    return config.lr * warm * (floor + (1 - floor) * shape)


def _master(parameter: Parameter) -> Tensor:
    if parameter.dtype in (torch.float32, torch.float64):
        return parameter
    return parameter.detach().float().clone()


def _taken(saved: Tensor, master: Tensor) -> Tensor:
    """A moment for ``master``: a shard as it is, of a whole tensor a copy of this rank's part."""
    return saved if isinstance(saved, DTensor) else shard_like(saved, master).clone()


def _host_master(parameter: Parameter) -> Tensor:
    master = parameter.detach().to("cpu", torch.promote_types(parameter.dtype, torch.float32), copy=True)
    return master.pin_memory() if parameter.is_cuda else master


def _accumulator(master: Tensor):  # type: ignore[no-untyped-def]
    def accumulate(parameter: Tensor) -> None:
        gradient = own_gradient(parameter).to(master.dtype)
        master.grad = gradient if master.grad is None else master.grad.add_(gradient)
        parameter.grad = None

    return accumulate
