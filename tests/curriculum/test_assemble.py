"""What a run says about the bodies that it uses. The wiring itself is tested through the command line."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from isomorph.curriculum import assemble
from isomorph.curriculum.judge import JudgePool
from isomorph.engine.update.distributed import Ranks
from isomorph.kernels import backend


def a_policy(head_dim: int) -> Any:
    return SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.bfloat16, head_dim=head_dim)


@pytest.fixture
def h100_without_flash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(backend.ENVIRONMENT, raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(backend, "native_available", lambda: True)
    monkeypatch.setattr(backend, "triton_reason", lambda: "")
    monkeypatch.setattr(backend, "flash_reason", lambda: "flash is not here")


@pytest.mark.usefixtures("h100_without_flash")
def test_attention_that_makes_all_scores_is_a_fallback_unless_it_was_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert assemble.fallbacks(a_policy(128)) == []
    (fallback,) = assemble.fallbacks(a_policy(256))
    assert "tokens x tokens" in fallback and "flash is not here" in fallback
    monkeypatch.setenv(backend.ENVIRONMENT, "packed_attention=reference")
    assert assemble.fallbacks(a_policy(256)) == []


@pytest.mark.usefixtures("h100_without_flash")
def test_a_gpu_without_triton_is_a_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "triton_reason", lambda: "triton is not installed")
    assert any("PyTorch bodies on the GPU: triton is not installed" in x for x in assemble.fallbacks(a_policy(128)))


def test_what_could_not_be_judged_is_summed_over_the_ranks() -> None:
    class Two(Ranks):
        def gather(self, own: Any) -> list[Any]:
            return [own, {"timeouts": 1, "crashes": 0, "errors": 4}]

    with JudgePool() as judges:
        judges.num_timeouts, judges.num_crashes = 2, 3
        assert assemble._counted(judges, Two(0, 2)) == {"timeouts": 3, "crashes": 3, "errors": 4}
