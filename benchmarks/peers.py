"""Other projects' functions for the linear head, each called as its own trainer calls it.

``LOGPROBS`` give the log-probability of the targets [N] (some the entropy as well), differentiable in both operands,
so that any policy loss can stand on them; below them are whole losses. All take rows without padding. What cannot run
here raises ``Absent``, or ``ImportError``, when it is made.
"""

import importlib.metadata
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from compare import DEVICE, Absent
from torch import Tensor

Logprob = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]  # hidden [N, D], weight [V, D], target [N]
RowLogprob = Callable[[Tensor, Tensor], tuple[Tensor, ...]]  # logits [N, V], target [N]
Loss = Callable[[Tensor, Tensor], Tensor]  # hidden [N, D], weight [V, D] -> scalar

torch._dynamo.config.recompile_limit = 256  # cases share their functions' code; past 8 shapes of one it would be eager


# -- PyTorch
def eager(hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor) -> Tensor:
    """Logits in the dtype of the inputs, softmax in float32: what most trainers write."""
    return row_stats(hidden_ND @ weight_VD.T, target_N)[0]


def row_stats(logits_NV: Tensor, target_N: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy."""
    logits_NV = logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()
    logprob_NV = torch.log_softmax(logits_NV, -1)
    return logprob_NV.gather(1, target_N[:, None])[:, 0], -(logprob_NV.exp() * logprob_NV).sum(-1)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled for these shapes alone."""
    return torch.compile(function, dynamic=False)


# -- log-probabilities of the targets
def trl_softmax() -> Logprob:
    from trl.trainer.utils import selective_log_softmax

    return lambda hidden, weight, target: (selective_log_softmax(hidden @ weight.T, target),)


def trl_chunked() -> Logprob:
    """What TRL's GRPO trainer calls, with its 32,768 columns at a time."""
    from trl.kernels import ChunkedLogProbFunction

    def run(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        return ChunkedLogProbFunction.apply(hidden, weight, None, target, 1.0, 32_768, None, 1.0, ("entropy",))[:2]

    return run


def verl() -> Logprob:
    """Its file is loaded alone: importing the package asks for Ray."""
    require("verl", "pip install --no-deps verl==0.9.1, whose pins exclude this transformers")
    path = importlib.metadata.distribution("verl").locate_file("verl/utils/experimental/torch_functional.py")
    spec = importlib.util.spec_from_file_location("verl_torch_functional", str(path))
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    fused = module.FusedLinearForPPO()
    return lambda hidden, weight, target: fused(hidden, weight, target)


def torch_fused(*, chunked: bool) -> Logprob:
    options = _torch_options(chunked)
    return lambda hidden, weight, target: (
        -F.linear_cross_entropy(hidden, weight, target, reduction="none", **options),
    )


def cce() -> Logprob:
    """Its kernels on a GPU, its implementation with torch.compile elsewhere."""
    require("cut_cross_entropy")
    from cut_cross_entropy import linear_cross_entropy

    impl = "cce" if DEVICE.type == "cuda" else "torch_compile"
    return lambda hidden, weight, target: (-linear_cross_entropy(hidden, weight, target, reduction="none", impl=impl),)


LOGPROBS: dict[str, Callable[[], Logprob]] = {
    "trl selective_log_softmax": trl_softmax,
    "trl ChunkedLogProbFunction": trl_chunked,
    "verl FusedLinearForPPO": verl,
    "torch linear_cross_entropy": lambda: torch_fused(chunked=False),
    "torch linear_cross_entropy, chunked": lambda: torch_fused(chunked=True),
    "cce" if DEVICE.type == "cuda" else "cce torch_compile": cce,
}


# -- log-probabilities from logits [N, V]; neither has the entropy. Liger's wants a row more than it reads, a copy here
def flash_attn_rows() -> RowLogprob:
    require("flash_attn")
    need_gpu("flash-attn")
    from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

    return lambda logits_NV, target_N: (-cross_entropy_loss(logits_NV, target_N)[0],)


def quack_rows() -> RowLogprob:
    require("quack", "pip install quack-kernels, for Hopper and later")
    need_gpu("quack")
    from quack.cross_entropy import cross_entropy

    return lambda logits_NV, target_N: (-cross_entropy(logits_NV, target_N, reduction="none"),)


ROW_LOGPROBS: dict[str, Callable[[], RowLogprob]] = {
    "flash-attn cross_entropy_loss": flash_attn_rows,
    "quack cross_entropy": quack_rows,
}


# -- whole losses
def liger_grpo(target_N: Tensor, old_N: Tensor, advantage_N: Tensor) -> Loss:
    """Every row is a sequence of one token, all in one chunk, and "bnpo" is the mean over tokens.

    Inside it walks tiles of 2,048 rows and 4,096 columns, whatever the shape of the batch.
    """
    require("liger_kernel")
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    num = len(target_N)
    loss = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, loss_type="bnpo", chunk_size=num)
    mask_N1 = torch.ones(num, 1, device=target_N.device)
    old_N1, advantage_N = old_N.float()[:, None], advantage_N.float()
    return lambda hidden, weight: loss(
        hidden[:, None], weight, target_N[:, None], mask_N1, advantage_N, old_per_token_logps=old_N1
    )[0]


def liger_cross_entropy(target_N: Tensor) -> Loss:
    require("liger_kernel")
    need_gpu("Liger's Triton kernel")
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(accum_dtype=torch.float32)  # sums chunks in float32, as ours does
    return lambda hidden, weight: loss(weight, hidden, target_N)


def torch_cross_entropy(target_N: Tensor, *, chunked: bool) -> Loss:
    options = _torch_options(chunked)
    return lambda hidden, weight: F.linear_cross_entropy(hidden, weight, target_N, **options)


def quack(target_N: Tensor) -> Loss:
    require("quack", "pip install quack-kernels, for Hopper and later")
    need_gpu("quack")
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return lambda hidden, weight: chunked_linear_cross_entropy(hidden, weight, target_N)


CROSS_ENTROPIES: dict[str, Callable[[Tensor], Loss]] = {
    "torch linear_cross_entropy": lambda target_N: torch_cross_entropy(target_N, chunked=False),
    "torch linear_cross_entropy, chunked": lambda target_N: torch_cross_entropy(target_N, chunked=True),
    "liger": liger_cross_entropy,
    "quack": quack,
}


def _torch_options(chunked: bool) -> dict[str, Any]:
    if not hasattr(F, "linear_cross_entropy"):
        raise Absent(f"torch {torch.__version__} has no linear_cross_entropy; it came with 2.13")
    return {"options": torch.nn.LinearCrossEntropyOptions()} if chunked else {}


def require(module: str, how: str = "") -> None:
    if importlib.util.find_spec(module) is None:
        raise Absent(f"{module} is not installed{'; ' + how if how else ''}")


def need_gpu(name: str) -> None:
    if DEVICE.type != "cuda":
        raise Absent(f"{name} needs a GPU")
