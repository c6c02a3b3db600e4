"""Tokens a second and memory from 1 to 64 GPUs by arithmetic, into docs/scale.md. Nothing here is measured on GPUs.

    python benchmarks/scale.py [--write]      --write: into the page, between its markers

Memory is the planner's (engine/planner.py). Seconds are its lower bounds at the rates below, and the seconds that the
network takes beside them: behind the update with FSDP2, after it with data parallel. Idle shares come from
benchmarks/step_simulation.py with the same durations.
"""

import argparse
import dataclasses
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from markers import between
from step_simulation import Costs, Group, check_text, checked, forms, load_rows, pool_of, table

from isomorph.engine.config import EngineConfig, LoraConfig, ModelConfig, Stage
from isomorph.engine.model.load import read_shape
from isomorph.engine.planner import GIB, Facts, ModelShape, facts_of
from isomorph.engine.planner_fit import changes_that_fit, fits, host_gib, peak_gib
from isomorph.engine.planner_time import Ceilings, network_bytes, seconds

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "scale.md"
SHAPES = ROOT / "curriculum" / "recipes" / "shapes"

# Assumptions, each printed on the page
GEMM_SHARE, COPY_SHARE = 0.81, 0.88  # of the data sheet: what an H200 reached in benchmarks/RESULTS.md
H100, H200 = Ceilings(989e12, 3.35e12, "H100"), Ceilings(989e12, 4.8e12, "H200")
NODE = 8  # GPUs
NVLINK = 450e9  # bytes/s in one direction, of a GPU: data sheet of NVLink 4
FABRICS = {"8 x 400 Gb/s": 8 * 50e9, "1 x 100 Gb/s": 12.5e9}  # bytes/s in one direction, of a node of 8
PROMPTS, SAMPLES, PROMPT_TOK, RESPONSE_TOK, MICRO_TOK = 256, 8, 512, 2048, 16384
TOKEN_BYTES = 12  # of a response's token between ranks: int64 and a float32 log-probability
GPUS = (1, 2, 4, 8, 16, 32, 64)


class Model(NamedTuple):
    """A column of the tables."""

    name: str
    shape: str
    lora: LoraConfig | None = None
    memory_frac: float = 0.3  # vLLM's share


MODELS = (
    Model("1.5B full", "qwen2.5-1.5b"),
    Model("7B full", "qwen2.5-7b"),
    Model("14B LoRA", "qwen2.5-14b", LoraConfig(rank=16), 0.45),
)


@cache
def shape_of_model(name: str, lora: bool) -> ModelShape:
    config = ModelConfig(path=str(SHAPES / name), dtype="bfloat16")
    return read_shape(config, [], LoraConfig(rank=16) if lora else None)


def facts(model: Model, *, ranks: int, kind: str, gib: float, **tables: Any) -> Facts:
    """A step of 256 prompts with 8 responses of 2,048 tokens each, vLLM in the trainer's process."""
    publish = "copy" if kind == "fsdp" or model.lora is not None else "shared"
    config = EngineConfig.model_validate(
        {
            "model": {"path": "m", "dtype": "bfloat16", "gradient_checkpointing_every": 1, **tables},
            "sampler": {"kind": "vllm", "publish": publish, "memory_frac": model.memory_frac},
            "parallel": {"kind": kind},
            "lora": model.lora,
        }
    )
    batch = {"prompts": PROMPTS, "micro_batch_tok": MICRO_TOK}
    sampling = {"samples_per_prompt": SAMPLES, "max_new_tok": RESPONSE_TOK}
    stage = Stage.model_validate({"name": "rl", "steps": 1, "batch": batch, "sampling": sampling})
    shape = shape_of_model(model.shape, model.lora is not None)
    return facts_of(config, stage, shape, prompt_tok=PROMPT_TOK, device_gib=gib, is_gpu=True, num_ranks=ranks)


# -- memory
def memory_table() -> str:
    lines = [
        "| model | devices | of 80 GiB: peak + host | with | of 139 GiB: peak + host | with |",
        "| --- | ---: | ---: | --- | ---: | --- |",
    ]
    for model in MODELS:
        for ranks in (1, 2, 8):
            cells = [cell for gib in (80.0, 139.0) for cell in _fitting(model, ranks, gib)]
            lines.append(f"| {model.name} | {ranks} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _fitting(model: Model, ranks: int, gib: float) -> tuple[str, str]:
    """Peak on the device and in the host's memory of a rank, and the first way that fits, in the order of its cost."""
    ways: list[tuple[str, Facts]] = [("as it is", facts(model, ranks=ranks, kind="data", gib=gib))]
    if ranks > 1 and model.lora is None:
        ways.append(('`parallel.kind = "fsdp"`', facts(model, ranks=ranks, kind="fsdp", gib=gib)))
    for name, found in ways:
        if fits(found):
            return f"{peak_gib(found):.0f} + {host_gib(found):.0f}", name
    for name, found in reversed(ways):
        remedies = [one for one in changes_that_fit(found, H100) if one.is_enough]
        inside = [one for one in remedies if not any("ranks" in key for key in one.write)]
        if inside:
            keys = ", ".join(f"`{key}`" for key in inside[0].write)
            return (
                f"{inside[0].peak_gib:.0f} + {inside[0].host_gib:.0f}",
                keys if name == "as it is" else f"{name}, {keys}",
            )
    return f"{peak_gib(ways[-1][1]):.0f}", "does not fit"


# -- seconds
def rates(card: Ceilings) -> Ceilings:
    return Ceilings(card.flops * GEMM_SHARE, card.bandwidth * COPY_SHARE, card.source)


class Line(NamedTuple):
    """A step on some GPUs, in seconds."""

    gpus: int
    generate: float
    update: float
    sent: float  # bytes that a GPU sends
    inside: float  # seconds of them over NVLink
    between_nodes: dict[str, float]  # and over the fabric, by its name

    @property
    def compute(self) -> float:
        return self.generate + self.update

    def tokens_a_second(self, fabric: str, *, overlaps: bool) -> float:
        """Response tokens. ``overlaps``: all of the network's time behind the update, as far as that lasts."""
        network = max(self.inside, self.between_nodes[fabric])
        total = self.generate + max(self.update, network) if overlaps else self.compute + network
        return PROMPTS * SAMPLES * RESPONSE_TOK / total


def line(model: Model, gpus: int, card: Ceilings, kind: str) -> Line:
    """The arithmetic of one step; the batch of 256 prompts is the same on any number of GPUs."""
    found = facts(model, ranks=gpus, kind=kind if gpus > 1 else "data", gib=139)
    times, sent = seconds(found, rates(card)), sum(network_bytes(found).values())
    crosses = gpus > NODE  # a ring enters and leaves each node once for each of its channels
    fabric = {name: sent / rate if crosses else 0.0 for name, rate in FABRICS.items()}
    return Line(gpus, times["generate"], times["update"], sent, sent / NVLINK, fabric)


def time_table(model: Model, card: Ceilings, kind: str) -> str:
    fast, slow = FABRICS
    lines = [
        f"| GPUs | generate, s | update, s | a GPU sends, GiB | NVLink, s | {fast}, s | {slow}, s | tok/s | "
        f"tok/s at {slow} |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for gpus in GPUS:
        one = line(model, gpus, card, kind)
        found = [f"{one.tokens_a_second(fabric, overlaps=kind == 'fsdp'):,.0f}" for fabric in FABRICS]
        nodes = " | ".join(f"{one.between_nodes[name]:.1f}" for name in FABRICS)
        lines.append(
            f"| {gpus} | {one.generate:.1f} | {one.update:.1f} | {one.sent / GIB:,.0f} | {one.inside:.1f} | {nodes} | "
            f"{' | '.join(found)} |"
        )
    return "\n".join(lines)


def least_micro_tok(model: Model, card: Ceilings, rate: float) -> float:
    """Packed tokens of a micro-batch whose products take as long as its FSDP2 traffic at ``rate``; any number of GPUs.

    A weight in the backbone costs 8 FLOPs a token (forward, forward again, two in backward), and 2 + 2 + 4 bytes.
    """
    found = facts(model, ranks=64, kind="fsdp", gib=139)
    sent = network_bytes(found)
    passes = max(1.0, -(-found.forward_tok // found.micro_tok))
    of_pass = (sent["weights, update"] + sent["gradients"]) / passes
    update = dataclasses.replace(found, has_reference=False, share_scored=0.0)
    of_token = seconds(update, Ceilings(rates(card).flops, 1e30, ""))["update"] / update.forward_tok
    return of_pass / rate / of_token


def binding_table(card: Ceilings) -> str:
    lines = ["| network | bytes/s | 1.5B full | 7B full |", "| --- | ---: | ---: | ---: |"]
    for name, rate in {"NVLink, one node": NVLINK, **{f"{name} a node": r for name, r in FABRICS.items()}}.items():
        cells = [f"{least_micro_tok(model, card, rate):,.0f}" for model in MODELS[:2]]
        lines.append(f"| {name} | {rate / 1e9:,.1f} GB/s | {' | '.join(cells)} |")
    return "\n".join(lines)


def traffic_table(model: Model, gpus: int) -> str:
    """What a GPU sends in a step, by purpose, and how it would change."""
    found = facts(model, ranks=gpus, kind="fsdp", gib=139)
    data = facts(model, ranks=gpus, kind="data", gib=139)
    sent, share = network_bytes(found), (gpus - 1) / gpus
    passes = max(1.0, -(-found.forward_tok // found.micro_tok))
    weights = model_bytes(found)
    tokens = PROMPTS * SAMPLES * RESPONSE_TOK * TOKEN_BYTES * share
    nodes = gpus // NODE
    hybrid = 2 * (nodes - 1) / nodes * 4 * found.shape.num_parameters
    rows: Iterable[tuple[str, float]] = (
        *((f"FSDP2: {name}", num) for name, num in sent.items()),
        ("responses with log-probabilities", tokens),
        ("data parallel: gradients, once", sum(network_bytes(data).values())),
        ("FSDP2 with gradients reduced once a step", sum(sent.values()) - sent["gradients"] * (1 - 1 / passes)),
        ("FSDP2 with layers gathered once a step", sum(sent.values()) - sent["weights, update"] + share * weights),
        (f"hybrid sharding, between the {nodes} nodes alone, by a node", hybrid),
    )
    lines = ["| what a GPU sends in a step | GiB |", "| --- | ---: |"]
    return "\n".join([*lines, *(f"| {name} | {num / GIB:,.2f} |" for name, num in rows)])


def model_bytes(found: Facts) -> float:
    return float(found.weight_bytes * found.shape.num_parameters)


# -- idle shares at scale
def costs_of(model: Model, card: Ceilings, gpus: int) -> Costs:
    """Durations of the simulation from the same arithmetic as ``seconds``: lower bounds."""
    found, at = facts(model, ranks=gpus, kind="fsdp" if gpus > 1 else "data", gib=139), rates(card)
    shape = found.shape
    context = found.prompt_tok + found.response_tok / 2
    attention = 4 * shape.num_layers * shape.num_heads * shape.head_dim * context
    pass_flops = 2 * shape.num_backbone + attention
    one = dataclasses.replace(found, prompts=1)
    of_token = (
        seconds(one, at)["update"] - seconds(dataclasses.replace(one, prompts=0), at)["update"]
    ) / one.forward_tok
    return Costs(
        decode_fixed=model_bytes(found) / at.bandwidth,
        decode_row=(pass_flops + 2 * shape.num_head) / at.flops + context * found.kv_bytes_per_tok / at.bandwidth,
        prefill_tok=pass_flops / at.flops,
        learn_fixed=seconds(dataclasses.replace(found, prompts=0), at)["update"],
        learn_tok=of_token,
    )


def scaled(pool: Sequence[Group], mean_tok: float) -> list[Group]:
    """``pool`` with all lengths multiplied so that their mean is ``mean_tok``: the same distribution, longer."""
    lengths = [n for group in pool for n in group.lengths]
    factor = mean_tok / (sum(lengths) / len(lengths))
    return [Group(PROMPT_TOK, tuple(max(1, round(n * factor)) for n in group.lengths), group.is_flat) for group in pool]


def idle_table(model: Model, card: Ceilings, pool: Sequence[Group]) -> str:
    lines = ["| GPUs | form | step, s | idle | rows filled while drawing |", "| ---: | --- | ---: | ---: | ---: |"]
    longer = scaled(pool, RESPONSE_TOK / 2)
    for gpus in (8, 64):
        for form in forms(longer, gpus, costs_of(model, card, gpus), prompts=PROMPTS // gpus, steps=5):
            lines.append(f"| {gpus} | {form.name} | {form.seconds:.1f} | {form.idle:.1%} | {form.row_share:.0%} |")
    return "\n".join(lines)


def arithmetic() -> dict[str, str]:
    """The page's parts that need no simulation, by marker."""
    seven = MODELS[1]
    return {
        "memory": memory_table(),
        "seconds-data": time_table(MODELS[0], H100, "data"),
        "seconds-fsdp": time_table(seven, H100, "fsdp"),
        "binding": binding_table(H100),
        "traffic": traffic_table(seven, 64),
    }


def simulations() -> dict[str, str]:
    rows = load_rows()
    check = checked(rows)
    return {
        "check": check_text(check) + ".",
        "forms": table(rows, check.costs, (1, 2, 4, 8), 16),
        "idle": idle_table(MODELS[1], H100, pool_of(rows)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    found, page = arithmetic() | simulations(), PAGE.read_text(encoding="utf-8") if parser.parse_args().write else ""
    for name, text in found.items():
        print(f"{name}\n\n{text}\n")
        page = between(page, name, text) if page else page
    if page:
        PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
