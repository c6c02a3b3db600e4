# What kernels/csrc/ builds. Called by the op files alone, after their checks; tensors are on the CPU.
from torch import Tensor

def assign_groups(cost: Tensor, max_tok: int, bin: Tensor) -> None: ...
def take_ragged(value: Tensor, offset: Tensor, item_bytes: int, segment: Tensor, out: Tensor) -> None: ...
def group_advantage(reward: Tensor, offset: Tensor, baseline: int, scale: int, eps: float, out: Tensor) -> None: ...
def gae(reward: Tensor, value: Tensor, offset: Tensor, gamma: float, lam: float, advantage: Tensor) -> None: ...
def decode_attention(
    q: Tensor,
    k_prompt: Tensor,
    v_prompt: Tensor,
    prompt_len: Tensor,
    k_own: Tensor,
    v_own: Tensor,
    own_len: Tensor,
    scale: float,
    out: Tensor,
) -> None: ...
