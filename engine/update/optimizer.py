"""AdamW with float32 masters: the step happens in float32, the parameter receives the rounded result in place.

At a learning rate of 1e-6 a bf16 weight changes by less than its own spacing in almost every step; only the master
remembers. Float32 (and, in tests, float64) parameters are their own masters.

On the host (as ZeRO-Offload has it, arXiv 2101.06840) masters, moments and accumulated gradients stand in host memory,
16 bytes a weight that a GPU need not have: each gradient goes there when it is made, PyTorch's fused CPU AdamW steps,
and the rounded weights come back. The arithmetic is the same. torchao 0.18 has the like, but without masters that
stand apart from the weights, and its 8-bit moments are tensor subclasses, compiled for each shape.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Parameter

from isomorph.engine.config import OptimConfig
from isomorph.engine.distributed.fsdp import full_tensor, local_shard, shard_like
from isomorph.engine.types import RunFailed


class MasterAdamW:
    """Owns masters, moments and the gradient accumulators of ``parameters``.

    A bf16 parameter's gradient is added into a float32 accumulator as soon as autograd has made it, so micro-batches
    do not round each other away.
    """

    def __init__(self, parameters: Mapping[str, Parameter], config: OptimConfig, *, on_host: bool = False) -> None:
        self.parameters = dict(parameters)
        make = _host_master if on_host else _master
        self.masters = {name: make(p) for name, p in self.parameters.items()}
        self.adamw = torch.optim.AdamW(
            list(self.masters.values()),
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self._hooks = [
            p.register_post_accumulate_grad_hook(_accumulator(self.masters[name]))
            for name, p in self.parameters.items()
            if self.masters[name] is not p
        ]

    def configure(self, config: OptimConfig) -> None:
        """Another stage's constants, with the moments carried over."""
        for group in self.adamw.param_groups:
            group.update(betas=config.betas, eps=config.eps, weight_decay=config.weight_decay)

    def reset(self, config: OptimConfig) -> None:
        """Another stage's constants, without the moments. The masters stay: they know more than rounded weights."""
        self.adamw.state.clear()
        self.configure(config)

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def gradients(self) -> list[Tensor]:
        """Of the masters, as accumulated so far; in place they can be summed over ranks."""
        return [master.grad for master in self.masters.values() if master.grad is not None]

    def zero_grad(self) -> None:
        self.adamw.zero_grad(set_to_none=True)

    @torch.no_grad()
    def step(self, *, lr: float, clip_norm: float) -> float:
        """One step; returns the norm of the gradient before clipping.

        Raises RunFailed where the norm is not finite: nothing has changed then.
        """
        total = full_tensor(torch.nn.utils.get_total_norm(self.gradients()))
        norm = total.item()
        if not math.isfinite(norm):
            raise RunFailed(
                f"the gradient's norm is {norm}: the weights are unchanged; "
                "lower optim.lr in the recipe and start again, or look at the rewards"
            )
        if norm > clip_norm:  # else a pass over all gradients would multiply them by 1
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
        """Masters and moments by name, for a checkpoint."""
        tensors = {
            f"master/{name}": full_tensor(master) for name, master in self.masters.items() if self._is_apart(name)
        }
        for name, master in self.masters.items():
            for key, value in self.adamw.state.get(master, {}).items():
                tensors[f"{key}/{name}"] = full_tensor(value)
        return tensors

    @torch.no_grad()
    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        for name, master in self.masters.items():
            if self._is_apart(name):
                master.copy_(shard_like(tensors[f"master/{name}"], master))
            if f"step/{name}" not in tensors:
                continue
            moments = {key: shard_like(tensors[f"{key}/{name}"], master).clone() for key in ("exp_avg", "exp_avg_sq")}
            state = {"step": tensors[f"step/{name}"].clone(), **moments}
            self.adamw.state[master] = {key: value.to(master.device) for key, value in state.items()}

    def _is_apart(self, name: str) -> bool:
        """The master knows more than the policy's weight: it is another tensor, or what FSDP rounds the weight from."""
        master = self.masters[name]
        return master is not self.parameters[name] or isinstance(master, DTensor)


def learning_rate(config: OptimConfig, step: int, num_steps: int) -> float:
    """Of the step after ``step`` completed ones of a stage of ``num_steps``: linear warm-up, then the schedule."""
    warm = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    done = step / num_steps
    shape = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[config.schedule]
    floor = 1.0 if config.schedule == "constant" else config.final_lr_frac
    return config.lr * warm * (floor + (1 - floor) * shape)


def _master(parameter: Parameter) -> Tensor:
    if parameter.dtype in (torch.float32, torch.float64):
        return parameter
    return parameter.detach().float().clone()


def _host_master(parameter: Parameter) -> Tensor:
    master = parameter.detach().to("cpu", torch.promote_types(parameter.dtype, torch.float32), copy=True)
    return master.pin_memory() if parameter.is_cuda else master


def _accumulator(master: Tensor):  # type: ignore[no-untyped-def]
    def accumulate(parameter: Tensor) -> None:
        assert parameter.grad is not None
        gradient = parameter.grad.to(master.device, master.dtype)
        master.grad = gradient if master.grad is None else master.grad.add_(gradient)
        parameter.grad = None

    return accumulate
