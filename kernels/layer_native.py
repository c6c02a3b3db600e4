"""What a decoder layer computes besides products and attention, in C++: RMS norm, SwiGLU, rotary embedding.

The functions are those of ``kernels/gpu/layer.py``, with the same arguments and roundings, for float32 and bfloat16 on
the CPU. The gradient of a norm's weight is summed over blocks of rows whose size depends on the shape alone, so no bit
depends on the number of threads.

The C++ functions take addresses, and check nothing: the functions here do.
"""

import torch
from torch import Tensor

from isomorph.kernels import backend
from isomorph.kernels.strides import check_contiguous, check_unit_stride

DTYPES = (torch.float32, torch.bfloat16)


def rms_norm(
    x_ND: Tensor, residual_ND: Tensor | None, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor | None, Tensor]:
    """y [N, D]; residual + x [N, D], None without a residual; 1 / root mean square [N] float32."""
    num, dim = x_ND.shape
    check_contiguous(x=x_ND, residual=residual_ND, weight=weight_D)
    _check("x, residual and weight", x_ND, residual_ND, weight_D)
    _check_sizes(num * dim, residual=residual_ND)
    _check_sizes(dim, weight=weight_D)
    y_ND = torch.empty_like(x_ND)
    total_ND = None if residual_ND is None else torch.empty_like(x_ND)
    rstd_N = x_ND.new_empty(num, dtype=torch.float32)
    backend.native().rms_norm(
        x_ND.dtype == torch.bfloat16, num, dim, x_ND.data_ptr(), _address(residual_ND), weight_D.data_ptr(), eps,
        y_ND.data_ptr(), _address(total_ND), rstd_N.data_ptr(),
    )  # fmt: skip
    return y_ND, total_ND, rstd_N


def rms_norm_gradient(
    total_ND: Tensor, weight_D: Tensor, rstd_N: Tensor, dy_ND: Tensor, dtotal_ND: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The gradients of what was normalised [N, D], ``dtotal`` included, and of the weight [D], in their dtypes."""
    num, dim = total_ND.shape
    check_contiguous(total=total_ND, weight=weight_D, rstd=rstd_N, dy=dy_ND, dtotal=dtotal_ND)
    _check("total, weight, dy and dtotal", total_ND, weight_D, dy_ND, dtotal_ND)
    _check("rstd", rstd_N, float32=True)
    _check_sizes(num * dim, dy=dy_ND, dtotal=dtotal_ND)
    _check_sizes(dim, weight=weight_D)
    _check_sizes(num, rstd=rstd_N)
    dx_ND = torch.empty_like(total_ND)
    dweight_D = torch.empty_like(weight_D, dtype=torch.float32)
    backend.native().rms_norm_gradient(
        total_ND.dtype == torch.bfloat16, num, dim, total_ND.data_ptr(), weight_D.data_ptr(), rstd_N.data_ptr(),
        dy_ND.data_ptr(), _address(dtotal_ND), dx_ND.data_ptr(), dweight_D.data_ptr(),
    )  # fmt: skip
    return dx_ND, dweight_D.to(weight_D.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, of contiguous tensors of one shape."""
    check_contiguous(gate=gate, up=up)
    _check("gate and up", gate, up)
    _check_sizes(gate.numel(), up=up)
    y = torch.empty_like(gate)
    backend.native().swiglu(gate.dtype == torch.bfloat16, gate.numel(), gate.data_ptr(), up.data_ptr(), y.data_ptr())
    return y


def swiglu_gradient(gate: Tensor, up: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up, of contiguous tensors of one shape."""
    check_contiguous(gate=gate, up=up, dy=dy)
    _check("gate, up and dy", gate, up, dy)
    _check_sizes(gate.numel(), up=up, dy=dy)
    dgate, dup = torch.empty_like(gate), torch.empty_like(up)
    backend.native().swiglu_gradient(
        gate.dtype == torch.bfloat16, gate.numel(), gate.data_ptr(), up.data_ptr(), dy.data_ptr(), dgate.data_ptr(),
        dup.data_ptr(),
    )  # fmt: skip
    return dgate, dup


def rotary(q_NHd: Tensor, k_NKd: Tensor, cos_Nd: Tensor, sin_Nd: Tensor, *, transposed: bool) -> tuple[Tensor, Tensor]:
    """Rotated queries and keys, contiguous; ``transposed``: rotated back, which is the gradient."""
    num, num_q, dim = q_NHd.shape
    num_k = k_NKd.shape[1]
    check_unit_stride(q=q_NHd, k=k_NKd)
    check_contiguous(cos=cos_Nd, sin=sin_Nd)
    _check("q and k", q_NHd, k_NKd)
    _check("cos and sin", cos_Nd, sin_Nd, float32=q_NHd.dtype != cos_Nd.dtype)
    _check_sizes(num * num_k * dim, k=k_NKd)
    _check_sizes(num * dim, cos=cos_Nd, sin=sin_Nd)
    q_out, k_out = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q_NHd, k_NKd))
    backend.native().rotary(
        q_NHd.dtype == torch.bfloat16, cos_Nd.dtype == torch.bfloat16, num, dim,
        cos_Nd.data_ptr(), sin_Nd.data_ptr(), transposed,
        q_NHd.data_ptr(), num_q, q_NHd.stride(0), q_NHd.stride(1), q_out.data_ptr(),
        k_NKd.data_ptr(), num_k, k_NKd.stride(0), k_NKd.stride(1), k_out.data_ptr(),
    )  # fmt: skip
    return q_out, k_out


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _check(names: str, first: Tensor, *others: Tensor | None, float32: bool = False) -> None:
    dtypes = (torch.float32,) if float32 else DTYPES
    given = [first, *(x for x in others if x is not None)]
    if any(x.device.type != "cpu" or x.dtype != first.dtype for x in given) or first.dtype not in dtypes:
        raise ValueError(
            f"{names} must be on the CPU and of one dtype out of {', '.join(map(str, dtypes))}, got "
            f"{', '.join(f'{x.dtype} on {x.device}' for x in given)}"
        )


def _check_sizes(size: int, **tensors: Tensor | None) -> None:
    for name, x in tensors.items():
        if x is not None and x.numel() != size:
            raise ValueError(f"{name} must have {size} elements, got shape {tuple(x.shape)}")
