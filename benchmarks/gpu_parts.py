"""What the parts of gpu_suite.py ask. Each yields rows; with ``rehearse`` at sizes that the CPU and Triton's
interpreter bear. Every row that is a single figure names it under "check"."""

import contextlib
import importlib
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from compare import DEVICE, PeakMemory, _quantiles, _take_turns, measure
from head_inputs import make_head
from torch import Tensor

from isomorph.kernels import backend
from isomorph.kernels.linear_logprob import linear_loss
from isomorph.kernels.packed_layout import PackedLayout
from isomorph.kernels.token_logprob import TokenStats, token_logprob

ROOT = Path(__file__).resolve().parents[1]
Rows = Iterator[dict[str, Any]]
# hidden, layers, heads, KV heads, intermediate
QWEN_1_5B = (1536, 28, 12, 2, 8960)
SMOLLM2_135M = (576, 30, 9, 3, 1536)
TINY = (32, 2, 2, 1, 64)


# -- correctness
def gpu_tests(rehearse: bool) -> Rows:
    """Every test that only a GPU can run."""
    yield _pytest(["tests/kernels/test_packing.py"] if rehearse else ["tests", "-m", "gpu"])


def kernel_tests(rehearse: bool) -> Rows:
    """The tests that interpret the Triton kernels elsewhere: here they run on the card."""
    files = ("gpu", "test_token_logprob.py", "test_linear_logprob.py", "test_packed_attention.py")
    chosen = [*(f"tests/kernels/{name}" for name in files), "-m", "not slow"]
    yield _pytest(["tests/kernels/test_packing.py"] if rehearse else chosen)


def _pytest(chosen: list[str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *chosen]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    last = (done.stdout.strip().splitlines() or [""])[-1]
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return {
        "check": " ".join(["pytest", *chosen]),
        "code": done.returncode,
        "result": last,
        "failed": failed,
        "output": done.stdout[-6000:],
        "errors": done.stderr[-2000:],
    }


def rows_alone(rehearse: bool) -> Rows:
    """A row has the same bits alone as in a batch, in every body; and the offset kernel's in thousands of launches."""
    num, vocab = (4, 300) if rehearse else (256, 151_936)
    logits = torch.randn(num, vocab, device=DEVICE)
    target = torch.randint(vocab, (num,), device=DEVICE)
    for body in backend.bodies("token_logprob", DEVICE.type):
        with backend.using(f"token_logprob={body}"):
            batch = token_logprob(logits, target)
            alone = [token_logprob(logits[i : i + 1], target[i : i + 1]) for i in range(min(num, 16))]
        same = all(torch.equal(b[i : i + 1], a) for i, one in enumerate(alone) for a, b in zip(one, batch, strict=True))
        yield {"check": f"token_logprob={body}: a row's bits alone and in a batch are the same", "value": same}
    if "offset" in backend.bodies("linear_loss", DEVICE.type):
        launches = 3 if rehearse else 10_000
        yield {"check": f"linear_loss=offset: the same bits in {launches} launches", "value": _repeats(launches)}


def _repeats(launches: int) -> bool:
    hidden, weight, target = make_head(24, 32, 700, torch.float32)
    leaves = (hidden.requires_grad_(), weight.requires_grad_())

    def once() -> tuple[Tensor, ...]:
        return torch.autograd.grad(linear_loss(*leaves, target, _sum), leaves)

    with backend.using("linear_loss=offset"):
        first = once()
        return all(torch.equal(a, b) for _ in range(launches) for a, b in zip(first, once(), strict=True))


def _sum(stats: TokenStats, rows: slice) -> Tensor:
    return -stats.logprob.sum()


# -- ops
def gemm_ceiling(rehearse: bool) -> Rows:
    """cuBLAS: the largest square that is usual, and the head's shapes, also accumulating into float32 results."""
    side, dim, vocab = (16, 32, 300) if rehearse else (8192, 1536, 151_936)
    a, b = (torch.randn(side, side, device=DEVICE).bfloat16() for _ in range(2))
    yield {"check": f"mm {side} x {side} x {side}", **_timed(lambda: a @ b, 2 * side**3)}
    for rows in (8,) if rehearse else (1024, 2048, 4096, 8192):
        a = torch.randn(rows, dim, device=DEVICE).bfloat16()
        w = torch.randn(dim, vocab, device=DEVICE).bfloat16()
        total = torch.zeros(rows, vocab, device=DEVICE)
        calls: dict[str, Callable[[], object]] = {
            "mm": lambda a=a, w=w: a @ w,  # type: ignore[misc]
            "mm to float32": lambda a=a, w=w: torch.mm(a, w, out_dtype=torch.float32),  # type: ignore[misc]
            "addmm to float32": lambda a=a, w=w, c=total: torch.addmm(c, a, w, out_dtype=torch.float32),  # type: ignore[misc]
        }
        for name, call in calls.items():
            try:
                timing: dict[str, Any] = _timed(call, 2 * rows * dim * vocab)
            except (NotImplementedError, RuntimeError) as failure:  # the CPU has no out_dtype; on a GPU this is news
                timing = {"failed": f"{type(failure).__name__}: {failure}"[:300]}
            yield {"check": f"{name} {rows} x {dim} x {vocab}", **timing}


def head_memory(rehearse: bool) -> Rows:
    """linear_loss at N = 65,536 with chunk_rows = 4096, forward and backward: the peak beside the gradients."""
    num, dim, vocab, chunk = (16, 32, 300, 8) if rehearse else (65_536, 1536, 151_936, 4096)
    hidden, weight, target = make_head(num, dim, vocab, torch.float32 if rehearse else torch.bfloat16)
    leaves = (hidden.requires_grad_(), weight.requires_grad_())
    for body in backend.bodies("linear_loss", DEVICE.type):
        if body == "reference":  # all logits at once
            continue
        memory = PeakMemory()
        with backend.using(f"linear_loss={body}"):
            grads = torch.autograd.grad(linear_loss(*leaves, target, _sum, chunk_rows=chunk), leaves)
        size = sum(grad.nbytes for grad in grads) / 2**20
        peak = memory.mib()
        beside = None if peak is None else peak - size
        yield {"check": f"linear_loss={body}: MiB beside the gradients at N={num}", "value": beside, "peak_mib": peak}
        del grads


def ops(file: str) -> Callable[[bool], Rows]:
    """Every case of a benchmark file, beside its peers."""

    def run(rehearse: bool) -> Rows:
        module = importlib.import_module(file)
        for case in _tiny(module) if rehearse else module.cases(quick=False):
            yield from measure(case, max_rounds=3 if rehearse else 20, budget_s=1.0 if rehearse else 5.0)

    return run


def _tiny(module: Any) -> list[Any]:
    """One case of the file at a size that the interpreter bears."""
    sizes: dict[str, tuple[Any, ...]] = {
        "bench_linear_loss": (4, 16, 300),
        "bench_linear_logprob": (4, 16, 300),
        "bench_token_logprob": (4, 300),
        "bench_decode_attention": (1, 2, 2, 1, 16, 8, 4),
    }
    if module.__name__ == "bench_sample_token":
        return [module._case(3, 300, torch.float32)]
    if module.__name__ == "bench_packed_attention":
        return [module._case(module.Shape(1, 4, 3, 2, 2, 1, 16), torch.float32)]
    if module.__name__ == "bench_advantage":
        return [module._groups(4, 3), module._gae(3, 5)]
    return [module._case(*sizes[module.__name__], torch.float32)]


# -- a model
def layer_stack(rehearse: bool) -> Rows:
    """Forward and backward of Qwen2.5-1.5B's layers at P = 2048, R = 1024, G = 16: packed against repeated prompts.

    Model: 6 FLOP a weight and token, and 14 d H for each visible pair and layer. Half the layers where 28 do not fit.
    """
    prompt, response, group, at_once = (6, 3, 4, 2) if rehearse else (2048, 1024, 16, 4)
    hidden, layers, *rest = TINY if rehearse else QWEN_1_5B
    if not rehearse and torch.cuda.get_device_properties(0).total_memory < 120 * 2**30:
        layers //= 2
    policy = _policy((hidden, layers, *rest), 100)
    packed = [PackedLayout.from_groups([prompt], [[response] * group])]
    repeated = [PackedLayout.from_groups([prompt + response] * at_once, [[]] * at_once)] * (group // at_once)
    seconds, flop = [], []
    for name, layouts in (("packed", packed), ("repeated", repeated)):
        batches = [_batch(policy, layout) for layout in layouts]
        memory = PeakMemory()
        timing = _timed(lambda batches=batches: _through(policy, batches), _body_flop(policy, layouts))  # type: ignore[misc]
        seconds.append(timing["median_s"])
        flop.append(_body_flop(policy, layouts))
        tokens = sum(layout.num_tok for layout in layouts)
        yield {"check": f"{layers} layers, {name}, {tokens} tokens", **timing, "peak_mib": memory.mib()}
    gain, model = seconds[1] / seconds[0], flop[1] / flop[0]
    yield {"check": "gain of packing, percent of the FLOP model's", "value": 100 * gain / model, "gain": gain}


def update(rehearse: bool) -> Rows:
    """Full fine-tuning of Qwen2.5-1.5B's shape, random weights: one GRPO update, AdamW with float32 masters."""
    from isomorph.engine.config import Stage
    from isomorph.engine.types import Group, Prompt, Rollout
    from isomorph.engine.update.learner import Learner
    from isomorph.engine.update.pack import pack

    prompts, prompt, response, size, vocab = (2, 6, 3, 2, 100) if rehearse else (8, 1024, 512, 8, 151_900)
    policy = _policy(TINY if rehearse else QWEN_1_5B, vocab)
    rng = random.Random(0)

    def group(index: int) -> Group:
        asked = Prompt(prompt_id=index, token_ids=_tokens(rng, prompt, vocab), task="", representation="", payload=None)
        answers = tuple(
            Rollout(
                prompt_id=index,
                sample=g,
                token_ids=torch.tensor(_tokens(rng, response, vocab)),
                sampler_logprob=None,
                finish="length",
                policy_version=0,
            )
            for g in range(size)
        )
        advantages = tuple(1.0 - 2.0 * (g % 2) for g in range(size))
        return Group(prompt=asked, rollouts=answers, rewards=advantages, advantages=advantages)

    tables = {"name": "gpu", "steps": 10, "objective": {"name": "grpo"}, "batch": {"prompts": prompts, "max_tok": 8192}}
    stage = Stage.model_validate({**tables, "sampling": {"samples_per_prompt": size, "max_new_tok": response}})
    groups = [group(i) for i in range(prompts)]
    updates = pack(
        groups, max_tok=stage.batch.max_tok, prompts_per_update=None, objective=stage.objective, device=DEVICE
    )
    learner = Learner(policy)
    learner.enter(stage)
    batches = [batch for u in updates for batch in u.batches]
    head = 6 * sum(b.num_loss_tok for b in batches) * policy.unembedding.numel()
    memory = PeakMemory()
    timing = _timed(
        lambda: learner.update(updates, stage, 0), _body_flop(policy, [b.layout for b in batches]) + head, budget_s=15.0
    )
    tokens = sum(len(b.token_ids) for b in batches)
    yield {
        "check": f"update of {sum(p.numel() for p in policy.named_parameters().values()) / 1e9:.2f} B parameters",
        **timing,
        "packed_tok_s": tokens / timing["median_s"],
        "unpacked_tok_s": prompts * size * (prompt + response) / timing["median_s"],
        "peak_mib": memory.mib(),
    }


def optimizers(rehearse: bool) -> Rows:
    """AdamW's step beside bfloat16 weights, and on the host with its transfers."""
    from isomorph.engine.config import OptimConfig
    from isomorph.engine.update.optimizer import MasterAdamW

    num, width = (2, 16) if rehearse else (32, 4096)
    for on_host in (False, True):
        weights = {
            f"{i}": torch.nn.Parameter(torch.randn(width, width, device=DEVICE).bfloat16() * 0.02) for i in range(num)
        }
        optimizer = MasterAdamW(weights, OptimConfig(), on_host=on_host)
        memory = PeakMemory()

        def step(weights: dict[str, Tensor] = weights, optimizer: MasterAdamW = optimizer) -> None:
            sum((p * 0.5).sum() for p in weights.values()).backward()  # type: ignore[union-attr]
            optimizer.step(lr=1e-6, clip_norm=1.0)
            optimizer.zero_grad()

        timing = _timed(step, 0, budget_s=15.0)
        place = "on the host" if on_host else "beside the weights"
        check = f"AdamW {place}, {num * width**2 / 1e6:.0f} M weights, gradients included"
        yield {"check": check, **timing, "peak_mib": memory.mib()}


def energy(rehearse: bool) -> Rows:
    """What NVML says of two busy seconds."""
    from isomorph.engine.record.telemetry import PERIOD_S, Telemetry, find_gpu

    telemetry = Telemetry(*find_gpu(DEVICE))
    size = 64 if rehearse else 8192
    a = torch.randn(size, size, device=DEVICE)
    with telemetry.watching():
        telemetry.begin()
        until = time.perf_counter() + (0.1 if rehearse else 2 * PERIOD_S)
        while time.perf_counter() < until:
            (a @ a).sum().item()
        row = telemetry.end(num_tok=1, num_correct=1)
    yield {"check": "energy of two busy seconds, J", "value": row["energy/step_j"], "reason": telemetry.reason, **row}


def sampler_speed(rehearse: bool) -> Rows:
    """The built-in sampler on Qwen2.5-1.5B's shape: 64 sequences of 8 prompts."""
    from isomorph.engine.config import SamplerConfig
    from isomorph.engine.rollout.builtin import BuiltinSampler
    from isomorph.engine.types import Prompt, Sampling

    prompts, group, prompt, new, vocab = (2, 2, 6, 3, 100) if rehearse else (8, 8, 512, 256, 151_900)
    policy = _policy(TINY if rehearse else QWEN_1_5B, vocab)
    sampler = BuiltinSampler(policy, SamplerConfig(max_seqs=prompts * group))
    rng = random.Random(0)
    asked = [
        Prompt(prompt_id=i, token_ids=_tokens(rng, prompt, vocab), task="", representation="", payload=None)
        for i in range(prompts)
    ]

    def generate(new_tok: int) -> object:
        return sampler.generate(
            asked, Sampling(temperature=1.0, max_new_tok=new_tok, samples_per_prompt=group, stop_ids=(), seed=0)
        )

    first = _timed(lambda: generate(1), 0)["median_s"]
    whole = _timed(lambda: generate(new), 0, budget_s=10.0)["median_s"]
    tok_s = prompts * group * (new - 1) / (whole - first)
    yield {"check": f"decode of {prompts * group} sequences, tok/s", "value": tok_s, "prefill_s": first}


# -- the whole thing
def smoke_run(rehearse: bool) -> Rows:
    """A real run through the command line: demonstrations, GRPO on graphs, DAPO on words."""
    short = ["stage.0.steps=2", "stage.1.steps=1", "stage.2.steps=1", "eval.prompts=2"] if rehearse else []
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        main = "from isomorph.curriculum.cli import main; main()"
        recipe = str(ROOT / "curriculum/recipes/smoke.toml")
        command = [sys.executable, "-c", main, "train", recipe, *short, "--run", str(run)]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        row = {"check": "isomorph train smoke.toml", "code": done.returncode, "output": done.stdout[-3000:]}
        with contextlib.suppress(FileNotFoundError):  # a run that failed early says so in its code and output
            row["summary"] = json.loads((run / "summary.json").read_text())
    yield {**row, "result": f"code {done.returncode}", "errors": done.stderr[-3000:]}


def step_beside_trl(rehearse: bool) -> Rows:
    """bench_step.py on a model of SmolLM2-135M's shape."""
    sizes = ["--steps", "1", "--prompts", "2", "--group", "2", "--max-new-tok", "4"]
    if not rehearse:
        sizes = ["--steps", "6", "--prompts", "16", "--group", "8", "--max-new-tok", "256", "--max-tok", "16384"]
    for row in _beside_trl("bench_step.py", sizes, rehearse):
        yield {"check": "a step beside TRL's, TRL's seconds over ours", **row}


def trl_adapter(rehearse: bool) -> Rows:
    """bench_trl_adapter.py on a model of SmolLM2-135M's shape."""
    sizes = ["--prompt-tok", "8", "--response-tok", "4", "--groups", "1", "--group", "2", "--rounds", "2"]
    if not rehearse:
        sizes = ["--prompt-tok", "600", "--response-tok", "256", "--groups", "4", "--group", "8", "--rounds", "10"]
    for row in _beside_trl("bench_trl_adapter.py", sizes, rehearse):
        yield {"check": "TRL's pass over a micro-batch, as it comes over packed", **row}


def _beside_trl(script: str, sizes: list[str], rehearse: bool) -> Rows:
    """The last row that the script writes, its ratio as the value, or why it wrote none."""
    with tempfile.TemporaryDirectory() as folder:
        _policy(TINY if rehearse else SMOLLM2_135M, 2000 if rehearse else 49_148).save(Path(folder) / "model")
        out = Path(folder) / "rows.jsonl"
        options = ["--model", f"{folder}/model", "--name", "SmolLM2-135M's shape", "--out", str(out)]
        dtype = ["--dtype", "float32" if rehearse else "bfloat16"]
        command = [sys.executable, str(ROOT / "benchmarks" / script), *options, *dtype, *sizes]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        rows = [json.loads(line) for line in out.read_text().splitlines()] if out.is_file() else []
    if done.returncode:
        yield {"failed": done.stderr.strip()[-1500:]}
    for row in rows[-1:]:
        yield {"value": row["ratio"], **row}


# -- helpers
def _policy(shape: tuple[int, ...], vocab: int) -> Any:
    """A decoder of this shape with random weights, on the device."""
    from isomorph.engine.config import TinyModel
    from isomorph.engine.policy import build_tiny

    names = ("hidden_size", "num_layers", "num_heads", "num_kv_heads", "intermediate_size")
    tiny = TinyModel(**dict(zip(names, shape, strict=True)), max_tok=4096)
    dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
    with torch.device(DEVICE):  # a billion random numbers are made where they are wanted
        return build_tiny(tiny, [f"w{i}" for i in range(vocab)], seed=0, dtype=dtype, device=DEVICE)


def _tokens(rng: random.Random, num: int, vocab: int) -> tuple[int, ...]:
    return tuple(rng.randrange(4, vocab) for _ in range(num))


def _batch(policy: Any, layout: PackedLayout) -> Any:
    from isomorph.engine.types import PackedBatch

    layout = layout.to(DEVICE)
    nothing = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    return PackedBatch(
        token_ids=torch.randint(4, 100, (layout.num_tok,), device=DEVICE),
        positions=layout.positions,
        layout=layout,
        row_index=nothing,
        target_ids=nothing,
        seq_id=nothing,
        sampler_logprob=None,
        advantage=torch.zeros(0, device=DEVICE),
    )


def _through(policy: Any, batches: list[Any]) -> None:
    for batch in batches:
        hidden_TD = policy.hidden(batch)
        hidden_TD.backward(torch.ones_like(hidden_TD))
    policy.model.zero_grad(set_to_none=True)


def _body_flop(policy: Any, layouts: list[PackedLayout]) -> int:
    """Forward and backward of the layers, without the head."""
    config = policy.config
    weights = sum(p.numel() for p in policy.model.model.layers.parameters())
    pairs = sum(_visible(layout) for layout in layouts)
    per_pair = 14 * policy.head_dim * config.num_attention_heads * config.num_hidden_layers
    return 6 * weights * sum(layout.num_tok for layout in layouts) + per_pair * pairs


def _visible(layout: PackedLayout) -> int:
    """Pairs of a query and a key that it sees."""
    pairs = 0
    for prompt, responses in zip(layout.prompt_lens, layout.response_lens, strict=True):
        pairs += prompt * (prompt + 1) // 2 + sum(r * prompt + r * (r + 1) // 2 for r in responses)
    return pairs


def _timed(call: Callable[[], object], flop: int, *, budget_s: float = 4.0) -> dict[str, float]:
    call()
    times = sorted(_take_turns({"it": call}, 20, budget_s)["it"])
    low, high = _quantiles(times)
    median = times[len(times) // 2]
    rate = {"tflops": flop / median / 1e12} if flop else {}
    return {"median_s": median, "p20_s": low, "p80_s": high, **rate}
