"""The GPU suite's order, limits and files, with parts of our own; .ci/rehearse_gpu runs the real ones."""

import inspect
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def _benchmarks_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


# -- order and limits
def test_the_shares_fill_nine_minutes_and_peers_come_last() -> None:
    import gpu_suite

    order = list(gpu_suite.PARTS)
    assert sum(share for _, share in gpu_suite.PARTS.values()) == gpu_suite.TOTAL_S == 540
    asked = ["correct_head", "correct_attention", "correct_decode", "gemm", "ours_head", "ours_rows", "sampler",
             "update", "layers", "run", "step"]  # fmt: skip
    assert sorted(asked, key=order.index) == asked
    assert min(order.index(name) for name in order if name.startswith("peers")) > order.index("step")


def test_every_part_is_a_function_that_exists() -> None:
    import gpu_suite

    for call, _ in gpu_suite.PARTS.values():
        module, function = call.split(":")
        assert callable(getattr(__import__(module), function)), call


def test_a_part_gets_its_share_and_what_was_left_over() -> None:
    from gpu_suite import limit_of_first

    assert limit_of_first([10, 20, 30], 60) == 10
    assert limit_of_first([10, 20, 30], 75) == 25  # those before took 15 s less than theirs
    assert limit_of_first([10, 20, 30], 30) == 5  # all are shortened alike
    assert limit_of_first([30], 7) == 7


# -- what a cut costs
PARTS = """
import os, subprocess, sys, time
from pathlib import Path
from gpu_rows import Absent

def fine(rehearse):
    print("said by fine")
    print("complained by fine", file=sys.stderr)
    yield {"check": "fine", "value": 1}

def measures_then_hangs(rehearse):
    yield {"check": "measured", "value": 7}
    sleeper = subprocess.Popen(["sleep", "600"])
    yield {"check": "sleeper", "value": sleeper.pid}
    print("about to hang", flush=True)
    Path("left behind").write_text("in the folder that goes")
    time.sleep(600)

def dies(rehearse):
    yield {"check": "before it died", "value": 3}
    os._exit(9)

def fails(rehearse):
    yield {"check": "before it failed", "value": 4}
    raise ValueError("no such shape")

def absent(rehearse):
    raise Absent("not installed: verl")
    yield

def does_not_hold(rehearse):
    yield {"check": "bits", "value": 2.0, "bound": 1.0, "holds": False}
"""


def start_suite(folder: Path, parts: dict[str, float], limit_s: float) -> subprocess.Popen[str]:
    """In another folder than the checkout's, with nothing but a relative path to the parts."""
    (folder / "lib").mkdir(parents=True)
    (folder / "lib" / "fake_parts.py").write_text(PARTS)
    calls = {name: (f"fake_parts:{name}", share) for name, share in parts.items()}
    script = f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r}); import gpu_suite; gpu_suite.PARTS = {calls!r}; "
    script += f"sys.exit(gpu_suite.main(['--out', 'out', '--limit-s', '{limit_s}', '--rehearse']))"
    command = [sys.executable, "-c", script]
    environment = os.environ | {"PYTHONPATH": "lib", "OMP_NUM_THREADS": "1"}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=folder, env=environment, **pipes)


def rows_in(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "out" / "gpu_suite.jsonl").read_text().splitlines()]


def is_alive(pid: int) -> bool:
    state = Path(f"/proc/{pid}/stat")
    return state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.slow
def test_what_was_measured_outlives_parts_that_hang_die_and_fail(tmp_path: Path) -> None:
    shares = dict.fromkeys(["fine", "fails", "absent", "dies", "measures_then_hangs", "does_not_hold"], 10.0)
    suite = start_suite(tmp_path, shares | {"measures_then_hangs": 3.0, "does_not_hold": 200.0}, 150.0)
    printed = suite.communicate(timeout=200)[0]
    rows = rows_in(tmp_path)
    ended = {row["part"]: str(row["ended"]) for row in rows if "ended" in row}
    assert list(ended) == list(shares)
    assert ended["fine"] == "0" and ended["does_not_hold"] == "0" and suite.returncode == 1, printed
    assert ended["fails"] == "failed: ValueError: no such shape" and ended["absent"] == "absent: not installed: verl"
    assert ended["dies"] == "the process died with 9" and ended["measures_then_hangs"].startswith("cut after")
    values = {row["check"]: row["value"] for row in rows if "check" in row}
    assert {"fine": 1, "before it failed": 4, "before it died": 3, "measured": 7, "bits": 2.0}.items() <= values.items()
    assert not is_alive(values["sleeper"]), "what a part has started must end with it"
    assert "measured: 7" in printed and "bits: DOES NOT HOLD, 2, bound 1" in printed
    log = (tmp_path / "out" / "gpu_suite.log").read_text()
    assert all(text in log for text in ("said by fine", "complained by fine", "about to hang", "no such shape"))
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["gpu_suite.jsonl", "gpu_suite.log"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["lib", "out"]


@pytest.mark.slow
def test_the_whole_call_keeps_its_limit(tmp_path: Path) -> None:
    started = time.monotonic()
    suite = start_suite(tmp_path, {"measures_then_hangs": 30.0, "fine": 1.0, "absent": 1.0}, 12.0)
    suite.communicate(timeout=60)
    assert time.monotonic() - started < 12 + 12  # Python's own start and end, on a busy machine; the part hangs for 600
    ended = {row["part"]: row["ended"] for row in rows_in(tmp_path) if "ended" in row}
    assert str(ended["measures_then_hangs"]).startswith("cut after") and ended["absent"] == "no time left"


def test_a_call_that_is_told_to_stop_leaves_its_rows_and_no_process(tmp_path: Path) -> None:
    suite = start_suite(tmp_path, {"measures_then_hangs": 100.0}, 100.0)
    log = tmp_path / "out" / "gpu_suite.log"
    while suite.poll() is None and not (log.exists() and "about to hang" in log.read_text()):
        time.sleep(0.05)
    suite.send_signal(signal.SIGTERM)
    assert suite.wait(timeout=20) == 143
    rows = rows_in(tmp_path)
    assert [row["ended"] for row in rows if "ended" in row] == ["stopped"]
    values = {row["check"]: row["value"] for row in rows if "check" in row}
    assert values["measured"] == 7 and not is_alive(values["sleeper"])


def test_a_log_without_end_stays_below_what_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu_worker

    monkeypatch.setattr(gpu_worker, "LOG_BYTES", 1000)
    with gpu_worker.Log(tmp_path / "log") as log:
        flood = subprocess.Popen(["sh", "-c", "seq 100000"], stdout=subprocess.PIPE)
        assert flood.stdout is not None
        log.copy(flood.stdout)
        log.say("== the next part")
    written = (tmp_path / "log").read_text()
    assert len(written) < 1200 and "left out" in written and written.endswith("== the next part\n")
    assert flood.wait() == 0, "the part that floods must not wait for a reader"


def test_rows_of_a_program_are_there_while_it_runs(tmp_path: Path) -> None:
    from gpu_runs import rows_of

    go, file = tmp_path / "go", tmp_path / "rows.jsonl"
    script = f"""echo '{{"turn": 0}}' >> {file}; while ! test -e {go}; do sleep 0.05; done
        echo '{{"turn": 1}}' >> {file}; exit 3"""
    rows = rows_of(["sh", "-c", script], file, cwd=tmp_path)
    assert next(rows) == {"turn": 0}
    go.touch()
    assert next(rows) == {"turn": 1}
    with pytest.raises(StopIteration) as end:
        next(rows)
    assert end.value.value == 3


@pytest.mark.slow
def test_a_test_file_that_cannot_be_collected_costs_no_other(tmp_path: Path) -> None:
    from gpu_runs import run_tests

    (tmp_path / "test_broken.py").write_text("import a_package_that_nobody_has\n")
    (tmp_path / "test_good.py").write_text("def test_right():\n    pass\n\ndef test_wrong():\n    assert 1 + 1 == 3\n")
    rows = list(run_tests([tmp_path / "test_broken.py", tmp_path / "test_good.py"], "not gpu"))
    holds = {row["check"].rpartition("/")[2].rpartition("::")[2]: row["holds"] for row in rows}
    assert holds.pop("test_right") is True and not any(holds.values()) and "test_wrong" in holds
    failed = "\n".join(row.get("failed", "") for row in rows)
    assert "a_package_that_nobody_has" in failed and "assert (1 + 1) == 3" in failed


# -- who is measured when
def test_a_peer_s_row_is_there_before_the_next_one_is_made() -> None:
    import compare

    right, made = torch.arange(5.0, device=compare.DEVICE), []

    def provider(name: str) -> Any:
        def make() -> Any:
            made.append(name)
            return lambda: (right,)

        return make

    names = [compare.OURS, f"{compare.OURS} (other)", compare.EAGER, compare.COMPILED, "peer"]
    case = compare.Case("op", "5", torch.float32, {name: provider(name) for name in names}, lambda: (right.double(),))
    assert list(compare.only_ours(case).providers) == names[:3]
    rows = compare.beside_each_peer(case, max_rounds=1, budget_s=0.1)
    first = next(rows)
    assert first["provider"] == "peer" and first["ratio"] > 0 and compare.COMPILED not in made
    assert [row["provider"] for row in rows] == [compare.COMPILED]


# -- PyTorch's attention by the signatures of 2.10, 2.11 and 2.12
def of_lengths(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, *, causal: bool, grouped: bool) -> Tensor:
    if not grouped and q.shape[1] != k.shape[1]:
        raise ValueError("as many KV heads as query heads are needed")
    parts = []
    for start, end in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True):
        q_, k_, v_ = (x[start:end].transpose(0, 1)[None] for x in (q, k, v))
        out = F.scaled_dot_product_attention(q_, k_, v_, is_causal=causal, enable_gqa=grouped)
        parts.append(out[0].transpose(0, 1))
    return torch.cat(parts)


def torch_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):  # type: ignore[no-untyped-def]
    return of_lengths(query, key, value, cu_seq_q, causal=is_causal, grouped=False)


def torch_2_11(  # type: ignore[no-untyped-def]
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
):
    return of_lengths(query, key, value, cu_seq_q, causal=window_size == (-1, 0), grouped=False)


def torch_2_12(  # type: ignore[no-untyped-def]
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False
):
    return of_lengths(query, key, value, cu_seq_q, causal=window_size == (-1, 0), grouped=enable_gqa)


@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize("varlen", [torch_2_10, torch_2_11, torch_2_12])
def test_the_attention_peer_is_called_in_the_words_of_its_torch(varlen: Any, repeats: int) -> None:
    from bench_packed_attention import causal_varlen

    q, k, v = (torch.randn(7, heads, 4) for heads in (2 * repeats, 2, 2))
    cu = torch.tensor([0, 3, 7], dtype=torch.int32)
    out = causal_varlen(varlen, repeats)(q, k, v, cu, cu, 4, 4)
    torch.testing.assert_close(out, of_lengths(q, k, v, cu, causal=True, grouped=True))


def test_the_installed_torch_takes_the_call() -> None:
    from bench_packed_attention import causal_varlen
    from torch.nn.attention.varlen import varlen_attn

    calls: list[inspect.BoundArguments] = []
    signature = inspect.signature(varlen_attn)

    def bound(*args: Any, **options: Any) -> Tensor:
        calls.append(signature.bind(*args, **options))
        return args[0]

    bound.__signature__ = signature  # type: ignore[attr-defined]
    x = torch.zeros(2, 2, 4)
    causal_varlen(bound, 1)(x, x, x, torch.tensor([0, 2]), torch.tensor([0, 2]), 2, 2)
    assert len(calls) == 1


# -- the checks see what is wrong
def spoilt(rows: Iterator[dict[str, Any]]) -> set[str]:
    return {row["check"] for row in rows if not row["holds"]}


def test_the_head_s_check_sees_one_spoilt_row() -> None:
    import gpu_correct as correct

    made = correct.make_head_problem(64, 16, 50, torch.float32)
    truth = correct._head_stats(made, 16)
    loss_of = correct._losses(made, truth)["GRPO"]
    exact = correct._head_gradients(made, loss_of, 16)
    assert spoilt(correct._check_gradients("right", "torch", made, loss_of, 16, exact)) == set()
    hidden = exact.hidden_TD.clone()
    hidden[hidden.norm(dim=1).argmax()] *= 1.01  # of one row in 48, by a hundredth
    found = spoilt(correct._check_gradients("", "torch", made, loss_of, 16, exact._replace(hidden_TD=hidden)))
    assert ": gradient of hidden, worst row" in found


def test_the_head_s_check_bears_rows_whose_terms_cancel() -> None:
    """Hidden rows are read twice, with opposite advantages: what is left of a row in bfloat16 is mostly rounding."""
    import gpu_correct as correct

    made = correct.make_head_problem(256, 64, 3000, torch.bfloat16)
    made = made._replace(row_index_N=torch.arange(256) // 2)
    sign_N = torch.tensor([1.0, -0.99]).repeat(128)

    def loss_of(stats: correct.TokenStats, rows: slice) -> torch.Tensor:
        return -(stats.logprob * sign_N[rows].to(stats.logprob.dtype)).sum()

    exact = correct._head_gradients(made, loss_of, 64)
    norm_V = exact.weight_VD.norm(dim=1)
    assert (exact.weight_terms[:, 0].sqrt() > 30 * norm_V).any()
    for body in set(correct.bodies_here("linear_loss")) & {"native", "torch"}:
        wrong = spoilt(correct._check_gradients("", body, made, loss_of, 64, exact))
        assert not [check for check in wrong if check.endswith("worst row")]


def test_draws_from_another_distribution_are_seen() -> None:
    import gpu_correct_bits as correct

    torch.manual_seed(0)
    for vocab, num in ((8, 20_000), (5_000, 20_000)):
        logits = 3 * torch.randn(vocab, dtype=torch.float64)
        prob = logits.softmax(-1)
        right, wrong = (torch.multinomial(p, num, replacement=True) for p in (prob, (logits / 1.1).softmax(-1)))
        assert correct._surprise(right.to(correct.DEVICE), prob.to(correct.DEVICE)) < 4
        assert correct._surprise(wrong.to(correct.DEVICE), prob.to(correct.DEVICE)) > 6


def test_the_recomputed_update_runs_every_layer_twice() -> None:
    import gpu_models
    import gpu_parts

    layout = gpu_models.PackedLayout.from_groups([4], [[3, 2]])
    policy = gpu_models.make_policy(gpu_models.TINY, gpu_models.VOCAB_TINY)
    runs: list[int] = []
    for layer in policy.model.model.layers:
        layer.register_forward_pre_hook(lambda *_: runs.append(1))
    num_layers = len(policy.model.model.layers)
    for once_more, expected in ((policy, num_layers), (gpu_models.changed(policy, recomputes=True), 2 * num_layers)):
        runs.clear()
        gpu_parts._through(once_more, [gpu_models.make_batch(layout)])
        assert len(runs) == expected
