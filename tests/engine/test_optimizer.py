import math

import pytest
import torch
from pydantic import ValidationError
from small_world import one_thread  # noqa: F401
from torch.nn import Parameter
from transformers import TrainingArguments

from isomorph.engine.config import OptimConfig, TinyModel
from isomorph.engine.model.load import build_tiny
from isomorph.engine.types import RunFailed
from isomorph.engine.update.optimizer import MasterAdamW, learning_rate

SHAPES = {"a": (5, 3), "b": (7,)}


def parameters(dtype: torch.dtype, scale: float = 1.0) -> dict[str, Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: Parameter((torch.randn(shape, generator=generator) * scale).to(dtype)) for name, shape in SHAPES.items()
    }


def gradients(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def push(params: dict[str, Parameter], grads: dict[str, torch.Tensor]) -> None:
    """The gradients arrive as they do in training: out of a backward pass."""
    sum((p.float() * grads[name]).sum() for name, p in params.items()).backward()  # type: ignore[union-attr]


def run(params: dict[str, Parameter], optimizer: MasterAdamW, steps: range, clip_norm: float = 1e9) -> list[float]:
    norms = []
    for step in steps:
        push(params, gradients(step))
        norms.append(optimizer.step(lr=0.01, clip_norm=clip_norm))
        optimizer.zero_grad()
    return norms


CONFIG = OptimConfig(lr=0.01, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.1)


def written_out(steps: range, clip_norm: float) -> dict[str, torch.Tensor]:
    """AdamW with clipping by the whole norm, in float64, from the paper (arXiv 1711.05101)."""
    weight = {name: p.detach().double() for name, p in parameters(torch.float32).items()}
    first = {name: torch.zeros_like(w) for name, w in weight.items()}
    second = {name: torch.zeros_like(w) for name, w in weight.items()}
    (beta1, beta2), lr = CONFIG.betas, 0.01
    for t, step in enumerate(steps, start=1):
        grads = {name: g.double() for name, g in gradients(step).items()}
        norm = math.sqrt(sum(float(g.square().sum()) for g in grads.values()))
        factor = min(1.0, clip_norm / (norm + 1e-6))
        for name, g in grads.items():
            first[name] = beta1 * first[name] + (1 - beta1) * g * factor
            second[name] = beta2 * second[name] + (1 - beta2) * (g * factor).square()
            update = (first[name] / (1 - beta1**t)) / ((second[name] / (1 - beta2**t)).sqrt() + CONFIG.eps)
            decay = CONFIG.weight_decay if name == "a" else 0.0  # "b" has one dimension, as norms and biases
            weight[name] = weight[name] * (1 - lr * decay) - lr * update
    return weight


@pytest.mark.parametrize("clip_norm", [1e9, 0.3])
def test_float32_steps_are_adamw_with_the_whole_gradient_clipped(clip_norm: float) -> None:
    params = parameters(torch.float32)
    norms = run(params, MasterAdamW(params, CONFIG), range(6), clip_norm)
    for name, weight in written_out(range(6), clip_norm).items():
        torch.testing.assert_close(params[name].detach().double(), weight, rtol=2e-6, atol=2e-7)
    whole = torch.cat([g.flatten() for g in gradients(0).values()]).norm()
    assert norms[0] == pytest.approx(float(whole), rel=1e-6)  # before clipping


def test_float32_steps_are_bit_equal_to_pytorchs_own() -> None:
    ours, theirs = parameters(torch.float32), parameters(torch.float32)
    run(ours, MasterAdamW(ours, CONFIG), range(5))
    groups = [{"params": [theirs["a"]], "weight_decay": 0.1}, {"params": [theirs["b"]], "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=0.01, betas=CONFIG.betas, eps=1e-6, fused=True)
    for step in range(5):
        push(theirs, gradients(step))
        adamw.step()
        adamw.zero_grad()
    assert all(torch.equal(ours[name], theirs[name]) for name in SHAPES)


@pytest.mark.parametrize("is_decayed", [False, True])
def test_norms_and_biases_are_decayed_where_they_are_asked_to_be(is_decayed: bool) -> None:
    """As Hugging Face's Trainer and torchtitan group them; of a whole model."""
    tiny = TinyModel(hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1, intermediate_size=24)
    policy = build_tiny(tiny, ["one", "two"], seed=0, dtype=torch.float32, device=torch.device("cpu"))
    policy.overwrite([torch.randn(p.shape) for p in policy.named_parameters().values()])  # biases begin at 0
    before = {name: p.detach().clone() for name, p in policy.named_parameters().items()}
    config = OptimConfig(lr=0.1, weight_decay=0.5, decay_norms_and_biases=is_decayed)
    optimizer = MasterAdamW(policy.named_parameters(), config)
    optimizer.configure(config)  # as another stage does
    for p in policy.named_parameters().values():
        p.grad = torch.zeros_like(p)  # so that only the decay acts
    optimizer.step(lr=0.1, clip_norm=None)
    kept = {name for name, p in policy.named_parameters().items() if torch.equal(p, before[name])}
    left_out = {name for name in before if "norm" in name or name.endswith(".bias")}
    assert len(left_out) == 7 and kept == (set() if is_decayed else left_out)
    decayed = before.keys() - kept
    assert all(torch.allclose(policy.named_parameters()[n], before[n] * (1 - 0.1 * 0.5)) for n in decayed)


def test_without_a_clip_the_gradient_is_used_as_it_is() -> None:
    free, wide = parameters(torch.float32), parameters(torch.float32)
    optimizers = MasterAdamW(free, CONFIG), MasterAdamW(wide, CONFIG)
    for params, optimizer, clip in zip((free, wide), optimizers, (None, 1e9), strict=True):
        push(params, {name: 1e3 * g for name, g in gradients(0).items()})
        assert optimizer.step(lr=0.01, clip_norm=clip) > 1e3
    assert all(torch.equal(free[name], wide[name]) for name in SHAPES)
    assert OptimConfig.model_validate({"clip_norm": "off"}).clip_norm is None


@pytest.mark.parametrize(("share", "num_steps", "num_warm"), [(0.25, 8, 2), (0.3, 8, 3), (1.0, 4, 4), (0.01, 5, 1)])
def test_a_warm_up_may_be_a_share_of_the_stage(share: float, num_steps: int, num_warm: int) -> None:
    """Rounded up, as transformers' Trainer does."""
    config = OptimConfig(lr=1.0, warmup_share=share)
    rates = [learning_rate(config, step, num_steps) for step in range(num_steps)]
    assert rates == pytest.approx([min(1.0, (step + 1) / num_warm) for step in range(num_steps)])
    theirs = TrainingArguments(output_dir="unused", warmup_steps=share) if share < 1 else None
    assert theirs is None or theirs.get_warmup_steps(num_steps) == num_warm
    with pytest.raises(ValidationError, match="remove one of them"):
        OptimConfig(warmup_share=share, warmup_steps=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_the_host_the_same_bits_come_out_and_nothing_stays_beside_the_weights(dtype: torch.dtype) -> None:
    beside, apart = parameters(dtype), parameters(dtype)
    optimizers = MasterAdamW(beside, CONFIG), MasterAdamW(apart, CONFIG, on_host=True)
    for step in range(4):
        norms = []
        for params, optimizer in zip((beside, apart), optimizers, strict=True):
            push(params, gradients(step))
            push(params, gradients(step + 50))  # micro-batches add up
            norms.append(optimizer.step(lr=0.01, clip_norm=1.0))
            optimizer.zero_grad()
        assert norms[0] == norms[1]
    assert all(torch.equal(beside[name], apart[name]) for name in SHAPES)
    host = optimizers[1]
    assert all(host.masters[name].data_ptr() != p.data_ptr() and p.grad is None for name, p in apart.items())
    copies = {name: Parameter(p.detach().clone()) for name, p in apart.items()}
    restored = MasterAdamW(copies, CONFIG, on_host=True)
    restored.load_state_tensors(host.state_tensors())
    for params, optimizer in ((apart, host), (copies, restored)):
        run(params, optimizer, range(7, 9))
    assert all(torch.equal(copies[name], apart[name]) for name in SHAPES)


def test_bf16_masters_walk_the_float32_path_and_parameters_are_their_rounding() -> None:
    params = parameters(torch.bfloat16)
    optimizer = MasterAdamW(params, CONFIG)
    twins = {name: Parameter(p.detach().float()) for name, p in params.items()}
    twin_optimizer = MasterAdamW(twins, CONFIG)
    for step in range(5):
        grads = {name: g.bfloat16().float() for name, g in gradients(step).items()}  # what bf16 autograd can deliver
        push(params, grads)
        push(twins, grads)
        assert optimizer.step(lr=0.01, clip_norm=1.0) == twin_optimizer.step(lr=0.01, clip_norm=1.0)
        optimizer.zero_grad()
        twin_optimizer.zero_grad()
    for name in SHAPES:
        assert params[name].dtype == torch.bfloat16
        assert torch.equal(optimizer.masters[name], twins[name])
        assert torch.equal(params[name], twins[name].bfloat16())


def test_tiny_steps_move_a_bf16_parameter_that_would_stand_still_without_a_master() -> None:
    params = {"a": Parameter(torch.full((4,), 1.0, dtype=torch.bfloat16))}
    optimizer = MasterAdamW(params, OptimConfig(lr=1e-6))
    alone = Parameter(torch.full((4,), 1.0, dtype=torch.bfloat16))
    without_master = torch.optim.AdamW([alone], lr=1e-6, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    num_steps = 3000  # 3e-3 in all: three quarters of 1.0's distance to the next smaller bf16
    for _ in range(num_steps):
        params["a"].sum().backward()
        optimizer.step(lr=1e-6, clip_norm=1e9)
        optimizer.zero_grad()
        alone.grad = torch.ones_like(alone)
        without_master.step()
    assert torch.equal(alone, torch.ones_like(alone))
    assert torch.allclose(optimizer.masters["a"], torch.full((4,), 1 - num_steps * 1e-6), atol=1e-4)
    assert torch.equal(params["a"], torch.full((4,), 1 - 2**-8, dtype=torch.bfloat16))


def test_gradients_of_many_micro_batches_are_added_in_float32() -> None:
    params = {"a": Parameter(torch.zeros(1, dtype=torch.bfloat16))}
    optimizer = MasterAdamW(params, OptimConfig())
    for gradient in [256.0] + [1.0] * 8:  # 256 + 1 is 256 in bf16
        (params["a"].float() * gradient).sum().backward()
    assert params["a"].grad is None  # no second accumulator
    assert optimizer.step(lr=1e-3, clip_norm=1e9) == 264.0


def test_zero_grad_forgets_the_gradient_of_every_dtype() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        params = parameters(dtype)
        optimizer = MasterAdamW(params, CONFIG)
        push(params, gradients(0))
        optimizer.zero_grad()
        push(params, gradients(1))
        whole = torch.cat([g.to(dtype).flatten() for g in gradients(1).values()]).double().norm()
        assert optimizer.step(lr=0.01, clip_norm=1e9) == pytest.approx(float(whole), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_ends_the_run_and_changes_nothing(dtype: torch.dtype, bad: float) -> None:
    params = parameters(dtype)
    optimizer = MasterAdamW(params, CONFIG)
    run(params, optimizer, range(2))
    before = {key: value.clone() for key, value in optimizer.state_tensors().items()}
    weights = {name: p.detach().clone() for name, p in params.items()}
    grads = gradients(2)
    grads["b"][3] = bad
    push(params, grads)
    with pytest.raises(RunFailed, match="weights are unchanged"):
        optimizer.step(lr=0.01, clip_norm=1.0)
    assert all(torch.equal(params[name], weights[name]) for name in SHAPES)
    assert all(torch.equal(value, before[key]) for key, value in optimizer.state_tensors().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_restored_state_goes_on_bit_for_bit(dtype: torch.dtype) -> None:
    params = parameters(dtype)
    optimizer = MasterAdamW(params, CONFIG)
    run(params, optimizer, range(3))
    saved = {key: value.clone() for key, value in optimizer.state_tensors().items()}
    copies = {name: Parameter(p.detach().clone()) for name, p in params.items()}
    run(params, optimizer, range(3, 6))
    restored = MasterAdamW(copies, CONFIG)
    restored.load_state_tensors(saved)
    run(copies, restored, range(3, 6))
    assert all(torch.equal(params[name], copies[name]) for name in SHAPES)
    for key, value in optimizer.state_tensors().items():
        assert torch.equal(value, restored.state_tensors()[key]), key


def test_another_stages_constants_keep_the_moments() -> None:
    params = parameters(torch.float32)
    optimizer = MasterAdamW(params, CONFIG)
    run(params, optimizer, range(2))
    moments = {key: value.clone() for key, value in optimizer.state_tensors().items()}
    optimizer.configure(OptimConfig(betas=(0.5, 0.6), eps=1e-3, weight_decay=0.0))
    assert all(torch.equal(value, moments[key]) for key, value in optimizer.state_tensors().items())
    push(params, gradients(2))
    optimizer.step(lr=0.0, clip_norm=1e9)
    torch.testing.assert_close(
        optimizer.state_tensors()["exp_avg/a"], 0.5 * moments["exp_avg/a"] + 0.5 * gradients(2)["a"]
    )


def test_a_closed_optimizer_leaves_gradients_to_the_next_one() -> None:
    params = parameters(torch.bfloat16)
    first = MasterAdamW(params, CONFIG)
    first.close()
    second = MasterAdamW(params, CONFIG)
    push(params, gradients(0))
    assert all(m.grad is None for m in first.masters.values())
    assert second.step(lr=0.01, clip_norm=1e9) > 0


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]),
        ("linear", [0.25 * 1.0, 0.5 * 0.9, 0.75 * 0.8, 0.7, 0.6, 0.5, 0.4, 0.3]),
        (
            "cosine",
            [w * (0.2 + 0.4 * (1 + math.cos(math.pi * i / 8))) for i, w in enumerate([0.25, 0.5, 0.75] + [1] * 5)],
        ),
    ],
)
def test_learning_rate_warms_up_and_then_follows_its_schedule(schedule: str, expected: list[float]) -> None:
    config = OptimConfig.model_validate(dict(lr=2.0, schedule=schedule, warmup_steps=4, final_lr_frac=0.2))
    assert [learning_rate(config, step, 8) for step in range(8)] == pytest.approx([2 * e for e in expected])
