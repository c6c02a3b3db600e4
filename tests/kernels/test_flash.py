"""PyTorch's FlashAttention accepts our arguments: checked with the ops' own shape functions, without a GPU."""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from isomorph.kernels.flash import VarlenBatch, torch_flash


def test_pytorchs_output_has_the_strides_of_q() -> None:
    by = torch_flash()
    assert by is not None
    with FakeTensorMode():
        q, k = (
            torch.empty(4, 18, 64, dtype=torch.bfloat16).transpose(0, 1),
            torch.empty(18, 2, 64, dtype=torch.bfloat16),
        )
        at = VarlenBatch(torch.empty(4, dtype=torch.int32), torch.empty(4, dtype=torch.int32), 9, 9, True)
        out, lse = by.forward(q, k, k, at, 0.1)
    assert out.stride() == q.stride() and not out.is_contiguous()
    assert lse.is_contiguous()


def test_pytorch_takes_our_arguments_and_gives_the_shapes_of_the_contract() -> None:
    by = torch_flash()
    assert by is not None
    with FakeTensorMode():
        q, k = torch.empty(18, 4, 64, dtype=torch.bfloat16), torch.empty(18, 2, 64, dtype=torch.bfloat16)
        at = VarlenBatch(torch.empty(4, dtype=torch.int32), torch.empty(4, dtype=torch.int32), 9, 9, True)
        out, lse = by.forward(q, k, k, at, 0.1)
        assert out.shape == q.shape and out.dtype == q.dtype
        assert lse.shape == (4, 18) and lse.dtype == torch.float32
        grads = by.backward(q, q, k, k, out, lse, at, 0.1)
        assert [x.shape for x in grads] == [q.shape, k.shape, k.shape]
