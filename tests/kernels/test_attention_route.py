"""Which implementation of packed_attention is selected, and the reason. ``route`` needs no GPU."""

import re

import pytest
import torch

from isomorph.kernels import attention_route, backend, flash
from isomorph.kernels.attention_route import Facts, route
from isomorph.kernels.packed_attention import packed_attention
from isomorph.kernels.packed_layout import PackedLayout

pytestmark = pytest.mark.usefixtures("no_environment")
A100, A10, H100, B200, B300, RTX50, T4 = (8, 0), (8, 6), (9, 0), (10, 0), (10, 3), (12, 0), (7, 5)
BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


@pytest.mark.parametrize(
    ("capability", "dtype", "head_dim", "is_tree", "deterministic", "no_flash", "body", "reason"),
    [
        (A100, BF16, 128, False, False, "", "varlen", "has kernels for sm_80"),
        (A10, F16, 64, False, False, "", "varlen", "has kernels for sm_86"),
        (H100, BF16, 128, False, False, "", "triton", "measured to be faster .* on sm_90"),
        (B200, BF16, 64, False, False, "", "varlen", "has kernels for sm_100"),
        (B300, BF16, 128, False, False, "", "varlen", "has kernels for sm_103"),
        (RTX50, BF16, 128, False, False, "", "triton", "no kernels for sm_120"),
        (H100, BF16, 128, True, False, "", "triton", "not trees"),
        (H100, BF16, 128, False, True, "", "triton", "deterministic"),
        (H100, F32, 128, False, False, "", "triton", "not float32"),
        (H100, BF16, 60, False, False, "", "triton", "multiples of 8 up to 256, not 60"),
        (H100, BF16, 128, False, False, "flash is not here", "triton", "flash is not here"),
        # what our kernels do not support goes to FlashAttention, even where ours would be preferred
        (H100, BF16, 256, False, False, "", "varlen", "up to 128, not 256"),
        (H100, BF16, 256, False, True, "", "varlen", "up to 128, not 256"),
        (RTX50, BF16, 192, False, False, "", "varlen", "up to 128, not 192"),
        # and what neither supports to the reference, with both reasons
        (H100, BF16, 256, True, False, "", "reference", "up to 128, not 256; .*not trees"),
        (H100, BF16, 512, False, False, "", "reference", "up to 128, not 512; .*up to 256, not 512"),
        (H100, F64, 64, False, False, "", "reference", "not float64; .*not float64"),
        (H100, F32, 256, False, False, "", "reference", "up to 128, not 256; .*not float32"),
        (T4, F16, 64, False, False, "", "reference", "need sm_80 or newer, and this GPU is sm_75"),
    ],
)
def test_the_rule(
    capability: tuple[int, int],
    dtype: torch.dtype,
    head_dim: int,
    is_tree: bool,
    deterministic: bool,
    no_flash: str,
    body: str,
    reason: str,
) -> None:
    found = route(Facts(capability, dtype, head_dim, is_tree, deterministic, no_flash))
    assert found.body == body
    assert re.search(reason, found.reason), found.reason


def test_flash_attention_3_is_preferred_where_it_runs_and_was_activated(monkeypatch: pytest.MonkeyPatch) -> None:
    def body(capability: tuple[int, int], *, is_tree: bool = False, deterministic: bool = False) -> str:
        return route(Facts(capability, BF16, 128, is_tree, deterministic, flash_version=3)).body

    assert body(H100) == "varlen" and body(RTX50) == body(H100, is_tree=True) == "triton"
    assert body(H100, deterministic=True) == "triton"  # it accumulates dQ in no fixed order
    assert "estimated" in route(Facts(H100, BF16, 128, False, False, flash_version=3)).reason
    assert flash.flash_version() == 2
    monkeypatch.setattr(torch.nn.attention, "current_flash_attention_impl", lambda: "FA3")
    by_pytorch = flash.torch_flash() is not None
    assert flash.flash_version() == (3 if by_pytorch else 2)
    monkeypatch.setattr(flash, "flash", flash.package_flash)  # the package flash-attn is version 2
    assert flash.flash_version() == 2


def test_a_gpu_without_triton_has_the_reference() -> None:
    absent = "triton is not installed"
    assert route(Facts(H100, BF16, 128, False, False, absent, absent)) == ("reference", f"{absent}; {absent}")


def test_the_cpu_has_its_own_bodies_whatever_the_inputs() -> None:
    cpp = "native" if backend.native_available() else "reference"
    for dtype, head_dim, is_tree, body in (
        (BF16, 256, False, cpp),
        (F64, 64, True, cpp),
        (F16, 64, False, "reference"),
    ):
        assert attention_route.choose(torch.device("cpu"), dtype, head_dim, is_tree=is_tree).body == body


def test_facts_of_a_gpu_are_collected_and_a_request_outranks_the_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: H100)
    monkeypatch.setattr(backend, "triton_reason", lambda: "")
    monkeypatch.setattr(backend, "flash_reason", lambda: "")
    backend._parse.cache_clear()
    assert attention_route.choose(gpu, BF16, 256, is_tree=False).body == "varlen"
    assert attention_route.choose(gpu, BF16, 128, is_tree=False).body == "triton"
    assert attention_route.choose(gpu, BF16, 128, is_tree=True).body == "triton"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: A100)
    assert attention_route.choose(gpu, BF16, 128, is_tree=False).body == "varlen"
    torch.use_deterministic_algorithms(True)
    try:
        assert attention_route.choose(gpu, BF16, 128, is_tree=False).body == "triton"
    finally:
        torch.use_deterministic_algorithms(False)
    for asked in ("triton", "varlen", "reference"):
        monkeypatch.setenv(backend.ENVIRONMENT, f"packed_attention={asked}")
        assert attention_route.choose(gpu, BF16, 128, is_tree=False) == (asked, "requested")
    monkeypatch.setattr(backend, "flash_reason", lambda: "flash is not here")
    backend._parse.cache_clear()
    monkeypatch.setenv(backend.ENVIRONMENT, "")
    assert attention_route.choose(gpu, BF16, 128, is_tree=False) == ("triton", "flash is not here")
    with pytest.raises(ValueError, match="requests varlen, which cannot run here: flash is not here"):
        backend.using("packed_attention=varlen").__enter__()


@pytest.mark.parametrize(
    ("asked", "dtype", "head_dim", "is_tree", "reason"),
    [
        ("triton", BF16, 256, False, "head dimensions up to 128, not 256"),
        ("triton", F64, 64, False, "float32, bfloat16 and float16, not float64"),
        ("varlen", BF16, 64, True, "not trees"),
        ("varlen", F32, 64, False, "bfloat16 and float16, not float32"),
        ("varlen", BF16, 20, False, "multiples of 8"),
    ],
)
def test_a_requested_body_that_does_not_support_the_inputs_is_an_error(
    asked: str, dtype: torch.dtype, head_dim: int, is_tree: bool, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "triton_reason", lambda: "")
    monkeypatch.setattr(backend, "flash_reason", lambda: "")
    backend._parse.cache_clear()
    monkeypatch.setenv(backend.ENVIRONMENT, f"packed_attention={asked}")
    with pytest.raises(ValueError, match=f"packed_attention={asked} was requested, but .*{reason}"):
        attention_route.choose(torch.device("cuda", 0), dtype, head_dim, is_tree=is_tree)


def test_the_op_obeys(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = PackedLayout.from_groups([2], [[1, 1]])
    q = torch.zeros(4, 1, 8, dtype=F64)
    monkeypatch.setattr(backend, "triton_reason", lambda: "")
    monkeypatch.setattr(backend, "interpreting", lambda: True)
    backend._parse.cache_clear()
    with backend.using("packed_attention=triton"), pytest.raises(ValueError, match="not float64"):
        packed_attention(q, q, q, layout)
