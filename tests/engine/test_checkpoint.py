import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from apart import start_apart
from killed_saving import CODE, save_and_die
from torch import Tensor

from isomorph.engine.config import OptimConfig, UserError
from isomorph.engine.record import checkpoint
from isomorph.engine.record.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint, weights_sha256
from isomorph.engine.types import RunFailed, RunState
from isomorph.engine.update.optimizer import MasterAdamW


def make_state(step: int = 5) -> RunState:
    return RunState(
        step=step,
        num_updates=2 * step,
        policy_version=step - 1,
        stage="symbols",
        source={"stage_index": 1, "positions": {"a:natural": 3}, "exams": [{"label": "ü", "accuracy": 0.1 + 0.2}]},
        totals={"wall_s": 12.3456789, "prompt_tok": 77},
    )


def make_weights(seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"model.a.weight": (5, 3), "model.b.weight": (7,)}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def save(root: Path, step: int = 5, keep: int = 2, seed: int = 0) -> Path:
    return save_checkpoint(root, make_state(step), make_weights(seed), {"step/a": torch.tensor(3.0)}, keep=keep)


def names(root: Path) -> list[str]:
    return sorted(p.name for p in root.iterdir())


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert set(ours) == set(theirs)
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype
        assert torch.equal(tensor, theirs[name]), name


# -- round trip
def test_what_was_saved_comes_back_bit_for_bit(tmp_path: Path) -> None:
    weights = make_weights(dtype=torch.bfloat16)
    weights["odd"] = torch.tensor([0.0, -0.0, float("nan"), float("inf"), 1e-45])
    learner = {"master/model.a.weight": make_weights(1)["model.a.weight"], "step/model.a.weight": torch.tensor(3.0)}
    folder = save_checkpoint(tmp_path / "checkpoints", make_state(), weights, learner, keep=1)
    state, found_weights, found_learner = load_checkpoint(folder)
    assert state == make_state()
    odd, found_odd = weights.pop("odd"), found_weights.pop("odd")
    assert torch.equal(odd.view(torch.int32), found_odd.view(torch.int32))
    assert_same(weights, found_weights)
    assert_same(learner, found_learner)


def test_a_learner_without_moments_can_be_saved(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, make_state(), make_weights(), {}, keep=1)
    assert load_checkpoint(folder)[2] == {}


def test_tensors_that_share_storage_are_saved_apart(tmp_path: Path) -> None:
    fused = torch.randn(6, 3)
    weights = {"q": fused[:4], "k": fused[4:], "turned": fused.T}
    _, found, _ = load_checkpoint(save_checkpoint(tmp_path, make_state(), weights, {}, keep=1))
    assert_same({name: w.contiguous() for name, w in weights.items()}, found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_optimizer_goes_on_bit_for_bit_from_the_disk(tmp_path: Path, dtype: torch.dtype) -> None:
    weight = torch.nn.Parameter(torch.randn(9, generator=torch.Generator().manual_seed(0)).to(dtype))
    optimizer = MasterAdamW({"w": weight}, OptimConfig())

    def go(p: torch.nn.Parameter, o: MasterAdamW, step: int) -> None:
        gradient = torch.randn(9, generator=torch.Generator().manual_seed(step))
        (p.float() * gradient).sum().backward()
        o.step(lr=1e-2, clip_norm=1.0)
        o.zero_grad()

    for step in range(3):
        go(weight, optimizer, step)
    folder = save_checkpoint(tmp_path, make_state(), {"w": weight.detach()}, optimizer.state_tensors(), keep=1)
    _, weights, tensors = load_checkpoint(folder)
    twin = torch.nn.Parameter(weights["w"].clone())
    other = MasterAdamW({"w": twin}, OptimConfig())
    other.load_state_tensors(tensors)
    for step in range(3, 6):
        go(weight, optimizer, step)
        go(twin, other, step)
    assert torch.equal(weight, twin)
    assert_same(optimizer.state_tensors(), other.state_tensors())


# -- which ones stay
def test_the_last_ones_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 10, 100):
        save(tmp_path, step, keep=2)
    assert names(tmp_path) == ["step-00000010", "step-00000100"]
    assert latest_checkpoint(tmp_path) == tmp_path / "step-00000100"


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 5, seed=0)
    save(tmp_path, 5, seed=1, keep=1)
    assert names(tmp_path) == ["step-00000005"]
    assert_same(load_checkpoint(tmp_path / "step-00000005")[1], make_weights(1))


def test_there_is_none_before_the_first(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None
    assert latest_checkpoint(tmp_path / "nowhere") is None


def test_what_a_lost_run_left_half_written_is_no_checkpoint_and_goes_away(tmp_path: Path) -> None:
    save(tmp_path, 4)
    (tmp_path / ".partial-00000005").mkdir()
    (tmp_path / ".partial-00000005" / "weights.safetensors").write_bytes(b"half")
    assert latest_checkpoint(tmp_path) == tmp_path / "step-00000004"
    save(tmp_path, 6)
    assert names(tmp_path) == ["step-00000004", "step-00000006"]


# -- when it goes wrong half-way
@pytest.mark.parametrize("broken", ["weights.safetensors", "optimizer.safetensors", "state.json"])
def test_a_write_that_fails_leaves_the_earlier_checkpoint_and_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    save(tmp_path, 4, keep=1)
    _refuse_to_sync(monkeypatch, broken)
    with pytest.raises(RunFailed, match=r"step 8 .*step-00000004"):
        save(tmp_path, 8, keep=1)
    assert names(tmp_path) == ["step-00000004"]
    assert load_checkpoint(tmp_path / "step-00000004")[0] == make_state(4)


def test_a_write_that_fails_when_a_step_is_saved_again_leaves_its_first_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 4, keep=1)
    _refuse_to_sync(monkeypatch, "state.json")
    with pytest.raises(RunFailed, match="step-00000004"):
        save(tmp_path, 4, keep=1, seed=1)
    assert_same(load_checkpoint(tmp_path / "step-00000004")[1], make_weights(0))


def test_a_failed_first_write_says_that_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _refuse_to_sync(monkeypatch, "weights.safetensors")
    with pytest.raises(RunFailed, match="no earlier checkpoint"):
        save(tmp_path, 4)
    assert names(tmp_path) == []


def _refuse_to_sync(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """What a dying disk does: the bytes went in, and do not arrive."""
    real = checkpoint.sync

    def sync(path: Path) -> None:
        if path.name == name:
            raise OSError(5, "Input/output error", str(path))
        real(path)

    monkeypatch.setattr(checkpoint, "sync", sync)


FILL = """
import resource, sys
from pathlib import Path
import torch
from isomorph.engine.record.checkpoint import save_checkpoint
from isomorph.engine.types import RunFailed, RunState

root, num = Path(sys.argv[1]), int(sys.argv[2])
save_checkpoint(root, RunState(step=1), {"w": torch.ones(10)}, {}, keep=1)
if sys.argv[3] == "limit":
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    save_checkpoint(root, RunState(step=2), {"w": torch.ones(num)}, {}, keep=1)
except RunFailed as error:
    print(error)
    sys.exit(1)
"""


def _fill(root: Path, num: int, how: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", FILL, str(root), str(num), how]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_a_file_that_may_not_grow_fails_the_run_and_leaves_the_earlier_checkpoint(tmp_path: Path) -> None:
    done = _fill(tmp_path, 100_000, "limit")
    assert done.returncode == 1, done.stderr
    assert "checkpoint of step 2" in done.stdout and "step-00000001" in done.stdout
    assert names(tmp_path) == ["step-00000001"]
    assert torch.equal(load_checkpoint(tmp_path / "step-00000001")[1]["w"], torch.ones(10))


def test_a_full_disk_fails_the_run_and_leaves_the_earlier_checkpoint(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("a disk of its own can be mounted by root alone")
    try:
        done = _fill(disk / "checkpoints", 100_000, "disk")
        assert done.returncode == 1, done.stderr
        assert "No space left" in done.stdout and "step-00000001" in done.stdout
        assert names(disk / "checkpoints") == ["step-00000001"]
        load_checkpoint(disk / "checkpoints" / "step-00000001")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("again", [False, True])
def test_a_process_killed_at_any_moment_leaves_a_checkpoint_that_can_be_read(tmp_path: Path, again: bool) -> None:
    """Dies before each call that changes the folder; ``again``: the same step was saved before."""
    first = 2 if again else 1
    codes = []
    for calls_left in range(40):
        root = tmp_path / f"{calls_left}"
        save_checkpoint(root, RunState(step=first), {"w": torch.full((10,), 1.0)}, {}, keep=1)
        codes.append(_killed(root, calls_left))
        newest = latest_checkpoint(root)
        assert newest is not None, f"killed after {calls_left} calls: {names(root)}"
        _, weights, _ = load_checkpoint(newest)
        assert weights["w"][0] in (1.0, 2.0)
        save(root, 2, keep=1)
        assert names(root) == ["step-00000002"]
        if codes[-1] == 0:
            break
    assert codes[-1] == 0 and set(codes[:-1]) == {CODE} and len(codes) > 6


def _killed(root: Path, calls_left: int) -> int | None:
    process = start_apart(save_and_die, root, calls_left)  # a new interpreter for each moment would take a minute
    process.join(60)
    return process.exitcode


# -- reading
def test_a_folder_that_is_no_checkpoint_is_the_users_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a readable checkpoint"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["state.json", "weights.safetensors", "optimizer.safetensors", "draws.safetensors"])
@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe\x00", b"[]", b"3", b'"x"', b"null", b'{"format": 2, "odd": 2}']
)
def test_an_unreadable_file_is_the_users_error_and_says_what_to_do(tmp_path: Path, name: str, content: bytes) -> None:
    folder = save(tmp_path)
    (folder / name).write_bytes(content)
    with pytest.raises(UserError, match="not a readable checkpoint") as caught:
        load_checkpoint(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_file_is_the_users_error(tmp_path: Path) -> None:
    for name in ("weights.safetensors", "optimizer.safetensors", "draws.safetensors"):
        folder = save(tmp_path)
        (folder / name).unlink()
        with pytest.raises(UserError, match="not a readable checkpoint"):
            load_checkpoint(folder)


def test_a_checkpoint_of_another_format_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path)
    fields: dict[str, Any] = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**fields, "format": 99}))
    with pytest.raises(UserError, match="format must be 2 or 3, got 99"):
        load_checkpoint(folder)


@pytest.mark.parametrize("name", ["state.json", "weights.safetensors", "optimizer.safetensors", "draws.safetensors"])
def test_a_flipped_bit_and_a_cut_file_are_refused_with_the_checkpoint_before(tmp_path: Path, name: str) -> None:
    before, folder = save(tmp_path, 4), save(tmp_path, 5)
    good = (folder / name).read_bytes()
    flipped = bytearray(good)
    flipped[-2 if name == "state.json" else -1] ^= 1
    for content in (bytes(flipped), good[:-1]):
        (folder / name).write_bytes(content)
        with pytest.raises(UserError, match="; the checkpoint before it is") as caught:
            load_checkpoint(folder)
        assert str(folder) in str(caught.value) and str(before) in str(caught.value)
    (folder / name).write_bytes(good)
    load_checkpoint(folder)


def test_a_checkpoint_of_before_there_were_checksums_is_read(tmp_path: Path) -> None:
    folder = save(tmp_path)
    (folder / "checksums.json").unlink()
    assert_same(load_checkpoint(folder)[1], make_weights())


# -- the digest
def test_the_digest_sees_names_and_every_bit_and_no_order() -> None:
    weights = make_weights()
    digest = weights_sha256(weights)
    assert digest == weights_sha256(dict(reversed(list(weights.items()))))
    assert digest != weights_sha256(
        {"model.c.weight": weights["model.a.weight"], "model.b.weight": weights["model.b.weight"]}
    )
    changed = {name: w.clone() for name, w in weights.items()}
    changed["model.b.weight"].view(torch.int32)[6] ^= 1
    assert digest != weights_sha256(changed)
    assert weights_sha256({"w": torch.zeros(3)}) != weights_sha256({"w": -torch.zeros(3)})
