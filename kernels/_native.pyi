# The module that kernels/csrc/ builds. Only the op files call it, after their checks; tensors are on the CPU.
from torch import Tensor

def row_stats(
    logits: Tensor,
    target: Tensor,
    bias: Tensor | None,
    inv_temperature: float,
    logprob: Tensor,
    entropy: Tensor,
    lse: Tensor,
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
) -> None: ...
def has_bfloat16_gemm() -> bool: ...
def bfloat16_gemm(x: Tensor, w: Tensor, out: Tensor) -> None: ...
def bfloat16_outer(a: Tensor, b: Tensor, out: Tensor) -> None: ...
def assign_groups(cost: Tensor, max_tok: int, bin: Tensor) -> None: ...
def take_ragged(value: Tensor, offset: Tensor, item_bytes: int, segment: Tensor, out: Tensor) -> None: ...
def bit_hash(value: Tensor, out: Tensor) -> None: ...
def group_advantage(reward: Tensor, offset: Tensor, baseline: int, scale: int, eps: float, out: Tensor) -> None: ...
def gae(reward: Tensor, value: Tensor, offset: Tensor, gamma: float, lam: float, advantage: Tensor) -> None: ...
def use_threads(count: int) -> None: ...
def use_order(order: str) -> None: ...  # for tests: "forward", "reverse", "shuffled": no threads; "": threads
def team_size() -> int: ...  # the number of system threads that a loop runs on
def isa() -> str: ...
def isas() -> list[str]: ...
def use_isa(isa: str) -> None: ...
def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, segments: Tensor, scale: float, out: Tensor, lse: Tensor
) -> None: ...
def packed_attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    segments: Tensor,
    scale: float,
    delta: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> None: ...
def decode_attention(
    q: Tensor,
    k_prompt: Tensor,
    v_prompt: Tensor,
    prompt_slot: Tensor,
    prompt_len: Tensor,
    k_own: Tensor,
    v_own: Tensor,
    own_slot: Tensor,
    own_len: Tensor,
    scale: float,
    out: Tensor,
) -> None: ...
def draw_token(
    logits: Tensor, rng_key: Tensor, position: Tensor, inv_temperature: float, token: Tensor, logprob: Tensor
) -> None: ...

# Addresses of tensors in place of tensors; 0: none.
def rms_norm(
    is_bfloat16: bool,
    num: int,
    dim: int,
    x: int,
    residual: int,
    weight: int,
    eps: float,
    y: int,
    total: int,
    rstd: int,
) -> None: ...
def rms_norm_gradient(
    is_bfloat16: bool,
    num: int,
    dim: int,
    total: int,
    weight: int,
    rstd: int,
    dy: int,
    dtotal: int,
    dx: int,
    dweight: int,
) -> None: ...
def swiglu(is_bfloat16: bool, size: int, gate: int, up: int, y: int) -> None: ...
def swiglu_gradient(is_bfloat16: bool, size: int, gate: int, up: int, dy: int, dgate: int, dup: int) -> None: ...
def rotary(
    is_bfloat16: bool,
    is_angle_bfloat16: bool,
    num: int,
    dim: int,
    cos: int,
    sin: int,
    transposed: bool,
    q: int,
    num_q: int,
    q_row: int,
    q_head: int,
    q_out: int,
    k: int,
    num_k: int,
    k_row: int,
    k_head: int,
    k_out: int,
) -> None: ...
