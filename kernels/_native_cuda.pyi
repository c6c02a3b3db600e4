# The module that kernels/csrc/cuda/ builds with -DISOMORPH_CUDA=ON. Only kernels/token_logprob.py calls it, after its
# checks; tensors are on one CUDA device, the stream is torch.cuda.current_stream().cuda_stream.
from torch import Tensor

def row_stats(
    logits: Tensor,
    target: Tensor,
    bias: Tensor | None,
    inv_temperature: float,
    logprob: Tensor,
    entropy: Tensor,
    lse: Tensor,
    stream: int,
) -> None: ...
def row_gradient(
    logits: Tensor,
    target: Tensor,
    logprob: Tensor,
    entropy: Tensor,
    dlogprob: Tensor | None,
    dentropy: Tensor | None,
    dlse: Tensor | None,
    bias: Tensor | None,
    inv_temperature: float,
    out: Tensor,
    stream: int,
) -> None: ...
