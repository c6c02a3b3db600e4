import pytest
import torch

from isomorph.kernels import backend
from isomorph.kernels import linear_logprob as linear_logprob_file
from isomorph.kernels.advantage import group_advantage
from isomorph.kernels.linear_logprob import linear_logprob

pytestmark = pytest.mark.usefixtures("no_environment")
needs_native = pytest.mark.skipif(not backend.native_available(), reason=backend.native_reason())


def test_the_table_names_a_body_for_every_op() -> None:
    for device in ("cpu", "cuda", "meta"):
        table = backend.table(device)
        assert set(table) == set(backend.OPS)
        assert set(table.values()) <= set(backend.NAMES)
    assert backend.table("cpu")["linear"] == "torch"
    assert backend.table("meta") == dict.fromkeys(backend.OPS, "reference")


@needs_native
def test_native_is_preferred_on_the_cpu_where_it_exists() -> None:
    assert backend.table("cpu")["group_advantage"] == "native"
    assert backend.native_reason() == ""


def test_a_machine_without_the_module_says_so_and_uses_other_bodies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_native_module", None)
    monkeypatch.setattr(backend, "_native_reason", "it was not built")
    backend._parse.cache_clear()
    assert not backend.native_available()
    assert "native" not in backend.table("cpu").values()
    assert group_advantage(torch.tensor([1.0, 0.0]), torch.tensor([0, 2]), scale="none").tolist() == [0.5, -0.5]
    with pytest.raises(ValueError, match="requests native, which cannot run here: it was not built"):
        backend.using("native").__enter__()


def test_cuda_bodies_that_were_not_built_are_refused_with_what_builds_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_cuda_module", None)
    monkeypatch.setattr(backend, "_cuda_reason", "`pip install . -C cmake.define.ISOMORPH_CUDA=ON` builds it")
    backend._parse.cache_clear()
    assert "cuda" not in backend.bodies("token_logprob", "cuda")
    with pytest.raises(ValueError, match="requests cuda, which cannot run here: `pip install . -C cmake.define"):
        backend.using("token_logprob=cuda").__enter__()
    monkeypatch.setattr(backend, "_cuda_module", object())
    backend._parse.cache_clear()
    assert "cuda" in backend.bodies("token_logprob", "cuda") and backend.choose("token_logprob", "cuda") != "cuda"
    with backend.using("token_logprob=cuda"):
        assert backend.choose("token_logprob", "cuda") == "cuda"


@pytest.mark.parametrize("how", ["environment", "block"])
def test_a_plain_name_takes_that_body_wherever_it_exists(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if how == "environment":
        monkeypatch.setenv(backend.ENVIRONMENT, "reference")
        assert set(backend.table("cpu").values()) == {"reference"}
    else:
        with backend.using("reference"):
            assert set(backend.table("cpu").values()) == {"reference"}
    with backend.using("torch"):
        assert backend.choose("decode_attention", "cpu") == "torch"


def test_single_ops_are_chosen_by_name_and_the_block_outranks_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(backend.ENVIRONMENT, "gae=reference, decode_attention=torch")
    assert backend.choose("gae", "cpu") == "reference"
    assert backend.choose("linear_loss", "cpu") == backend.bodies("linear_loss", "cpu")[0]
    with backend.using("linear_loss=reference"):
        assert backend.choose("linear_loss", "cpu") == "reference"
        assert backend.choose("gae", "cpu") != "reference" or not backend.native_available()
    assert backend.choose("linear_loss", "cpu") == backend.bodies("linear_loss", "cpu")[0]


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ("fastest", "must name one of triton, offset, varlen, native, cuda, torch, reference, got 'fastest'"),
        ("attention=torch", "names an unknown op 'attention'; ops: linear, rms_norm, swiglu"),
        ("gae=torch", "requests gae=torch, but gae on cpu has:"),
    ],
)
def test_a_choice_that_cannot_be_met_is_refused(request_: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(backend.ENVIRONMENT, request_)
    with pytest.raises(ValueError, match=message):
        backend.choose("gae", "cpu")


def test_triton_is_refused_where_it_can_neither_run_nor_be_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "triton_reason", lambda: "there is no CUDA device")
    backend._parse.cache_clear()
    assert "triton" not in (*backend.bodies("linear_loss", "cuda"), *backend.bodies("linear_loss", "cpu"))
    for request in ("triton", "linear_loss=triton"):
        with pytest.raises(ValueError, match="requests triton, which cannot run here: there is no CUDA device"):
            backend.using(request).__enter__()


def test_an_interpreted_kernel_runs_on_the_cpu_if_asked_and_never_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(backend, "triton_reason", lambda: "")
    assert "triton" in backend.bodies("linear_loss", "cpu")
    assert backend.choose("linear_loss", "cpu") != "triton"
    with backend.using("triton"):
        assert backend.choose("linear_loss", "cpu") == "triton"
    monkeypatch.delenv("TRITON_INTERPRET")
    assert "triton" not in backend.bodies("linear_loss", "cpu")


def test_an_unknown_op_is_refused() -> None:
    with pytest.raises(ValueError, match="no op is named 'softmax'"):
        backend.choose("softmax", "cpu")


def test_the_chosen_body_is_the_one_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*args: object, **kwargs: object) -> None:
        raise AssertionError("the reference ran")

    monkeypatch.setattr(linear_logprob_file, "linear_logprob_ref", absent)
    operands = torch.zeros(2, 3), torch.zeros(5, 3), torch.tensor([0, 1])
    linear_logprob(*operands)
    with backend.using("reference"), pytest.raises(AssertionError, match="the reference ran"):
        linear_logprob(*operands)
