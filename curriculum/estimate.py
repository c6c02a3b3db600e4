"""Estimates of a recipe's memory, disk and time before it runs, and their comparison with the run's first steps."""

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from isomorph.curriculum import machine
from isomorph.curriculum.inputs import located_model
from isomorph.curriculum.recipe import GeneratedData, Recipe
from isomorph.curriculum.sources import tiny_vocabulary
from isomorph.curriculum.stage_spec import StageRecipe
from isomorph.engine.config import LoraConfig, UserError
from isomorph.engine.distributed.ranks import Ranks
from isomorph.engine.model.load import read_shape, shape_of
from isomorph.engine.model.policy import Policy
from isomorph.engine.model.text import WORD
from isomorph.engine.planner import (
    GIB,
    MOMENTS,
    Facts,
    ModelShape,
    facts_of,
    largest_kv_tok,
    largest_micro_tok,
    memory_uses,
    peak_bytes,
)
from isomorph.engine.planner_fit import changes_that_fit, fits, peak_gib
from isomorph.engine.planner_time import card_ceilings, measure_ceilings, network_bytes, seconds
from isomorph.engine.record.runlog import Row, RunLog
from isomorph.engine.record.telemetry import process_memory_gib

NUM_RANKS = (1, 2, 4, 8)  # that a plan is made for besides its own
NUM_SAMPLES = 20  # questions generated to measure their mean length


def plan_recipe(recipe: Recipe, card: str | None, device_gib: float | None, num_ranks: int) -> dict[str, Any]:
    """Estimated memory, limits and seconds of every stage on one of ``num_ranks`` devices, JSON-able. Raises UserError.

    ``card``: a GPU type that the planner knows; None: this machine's CPU, whose memory and cores the ranks share.
    Also peaks on other numbers of ranks, and for a stage that does not fit the changes that make it fit.
    """
    recipe = _with_located_model(recipe)
    shape = read_shape(recipe.model, tiny_vocabulary(recipe), recipe.lora)
    own_gib, _ = process_memory_gib()  # as a run's before it loads a model: the same modules are imported
    if card is not None:
        known, ceilings = card_ceilings(card)
        device_gib = device_gib or known.gib
    else:
        ceilings = measure_ceilings(torch.device("cpu"), getattr(torch, recipe.model.dtype))
        ceilings = ceilings._replace(flops=ceilings.flops / num_ranks, bandwidth=ceilings.bandwidth / num_ranks)
    is_shared = device_gib is None  # the ranks share what this machine has
    if device_gib is None:
        free_gib = machine.available_gib()
        if free_gib is None:
            raise UserError("free memory cannot be read on this system: give --device-gib")
        device_gib = (free_gib + (own_gib or 0.0)) / num_ranks  # this process ends before a run begins
    options: dict[str, Any] = dict(device_gib=device_gib, is_gpu=card is not None, process_gib=own_gib)
    stages = []
    for stage in recipe.stage:
        facts = stage_facts(recipe, stage, shape, num_ranks=num_ranks, **options)
        planned = {
            "stage": stage.name,
            "device_gib": device_gib,
            **_planned(facts),
            "fits": fits(facts),
            "seconds": seconds(facts, ceilings),
        }
        adapters = None if fits(facts) or recipe.lora is not None else _adapted(recipe)
        remedies = [remedy._asdict() for remedy in changes_that_fit(facts, ceilings, adapters)]
        stages.append({**planned, "remedies": remedies})
    return {
        "device": card or "cpu",
        "device_gib": device_gib,
        "num_ranks": num_ranks,
        "ceilings": ceilings._asdict(),
        "model": dataclasses.asdict(shape),
        "stages": stages,
        "ranks": _on_ranks(recipe, shape, device_gib * num_ranks if is_shared else None, options),
    }


def stage_facts(
    recipe: Recipe,
    stage: StageRecipe,
    shape: ModelShape,
    *,
    device_gib: float,
    is_gpu: bool,
    num_ranks: int,
    process_gib: float | None,
) -> Facts:
    """The facts of a stage's longest step; of a stage in rounds (STaR) also of the sampling between its steps."""
    facts = facts_of(
        recipe,
        stage,
        shape,
        prompt_tok=_prompt_tok(recipe, stage),
        device_gib=device_gib,
        is_gpu=is_gpu,
        num_ranks=num_ranks,
    )
    is_due = recipe.run.checkpoint_every < sum(one.steps for one in recipe.stage)  # the last one is waited for
    facts = dataclasses.replace(facts, process_gib=process_gib, copies_checkpoint=facts.copies_checkpoint and is_due)
    if stage.star is None:
        return facts
    return dataclasses.replace(
        facts,
        is_sampled=True,
        drawn_prompts=-(-stage.star.prompts // num_ranks),
        drawn_samples=stage.star.samples,
        keeps_start=stage.star.start_from == "start",
    )


def _with_located_model(recipe: Recipe) -> Recipe:
    return recipe.model_copy(
        update={"model": recipe.model.model_copy(update={"path": located_model(recipe.model.path)})}
    )


def _adapted(recipe: Recipe) -> ModelShape:
    return read_shape(recipe.model, tiny_vocabulary(recipe), LoraConfig())


def _on_ranks(
    recipe: Recipe, shape: ModelShape, shared_gib: float | None, options: dict[str, Any]
) -> list[dict[str, Any]]:
    """The highest peak of each stage on 1, 2, 4 and 8 ranks; ``refused``: why FSDP2 is not supported, or None.

    ``shared_gib``: memory that all ranks share; None: each has a device of its own.
    """
    rows: list[dict[str, Any]] = []
    for num_ranks in NUM_RANKS:
        for kind in ("data", "fsdp") if num_ranks > 1 else ("data",):
            changed, refused = _of_kind(recipe, kind)
            of_rank = options if shared_gib is None else {**options, "device_gib": shared_gib / num_ranks}
            facts = [stage_facts(changed, s, shape, num_ranks=num_ranks, **of_rank) for s in changed.stage]
            peaks = [] if refused else [peak_gib(one) for one in facts]
            row = {"ranks": num_ranks, "kind": kind, "device_gib": of_rank["device_gib"], "refused": refused}
            rows.append({**row, "peak_gib": peaks, "network_gib": [_sent_gib(one) for one in facts] if peaks else []})
    return rows


def _sent_gib(facts: Facts) -> float:
    return sum(network_bytes(facts).values()) / GIB


def _of_kind(recipe: Recipe, kind: str) -> tuple[Recipe, str | None]:
    """The recipe with another ``parallel.kind``, and why that is refused. Weights shared with vLLM become copies."""
    tables = recipe.model_dump()
    tables["parallel"]["kind"] = kind
    if kind == "data":
        tables["parallel"]["shards"] = None
    else:
        tables["sampler"]["publish"] = "copy"
    try:
        return Recipe.model_validate(tables, context={"folder": recipe.folder}), None
    except ValidationError as error:
        return recipe, error.errors()[0]["msg"].removeprefix("Value error, ")


def short_of_memory(recipe: Recipe, policy: Policy, ranks: Ranks) -> list[str]:
    """A sentence for each stage whose estimate exceeds the device's memory, for responses of the greatest length.

    Called when the model is loaded. The estimate covers the trainer's tensors, not what Python and libraries take.
    """
    is_gpu = policy.device.type == "cuda"
    device_gib = _device_gib(policy.device, ranks.num_on_host)
    if device_gib is None:
        return []
    found = []
    for stage in recipe.stage:
        facts = stage_facts(
            recipe,
            stage,
            shape_of(policy.model),
            device_gib=device_gib,
            is_gpu=is_gpu,
            num_ranks=ranks.size,
            process_gib=None,
        )
        peaks = {moment: peak_bytes(facts, moment) / GIB for moment in MOMENTS}
        moment = max(MOMENTS, key=peaks.__getitem__)
        if peaks[moment] > device_gib:
            found.append(
                f"stage {stage.name}: {moment} needs up to {size_text(peaks[moment])} of memory and this device has "
                f"{size_text(device_gib)}: lower batch.micro_batch_tok ({largest_micro_tok(facts):,} tokens fit), "
                "sampling.max_new_tok or sampler.max_seqs; `isomorph plan` lists the memory by use"
            )
    return found


def checkpoint_bytes(recipe: Recipe, policy: Policy) -> int:
    """Of the weights, masters, moments and KL reference in one checkpoint; sampled responses come on top."""
    trained = list(policy.named_parameters().values())
    moments = 8 * sum(p.numel() for p in trained)
    masters = 4 * sum(p.numel() for p in trained if p.dtype.itemsize < 4)
    has_reference = any(stage.objective.needs_reference for stage in recipe.stage)
    return moments + masters + (1 + has_reference) * sum(p.nbytes for p in trained)


def short_of_disk(recipe: Recipe, policy: Policy, folder: Path) -> str | None:
    """A sentence where the disk is too small for the checkpoints to keep and the one being written; else None."""
    each = checkpoint_bytes(recipe, policy)
    kept = recipe.run.keep_checkpoints + len(recipe.stage) + (recipe.eval.keep_best is not None)
    needed, free = each * (kept + 1), shutil.disk_usage(folder).free
    if needed <= free:
        return None
    return (
        f"the run keeps up to {kept} checkpoints of {each / 2**30:.1f} GiB (run.keep_checkpoints, one of each stage's "
        f"end, the best one) and writes one more, {needed / 2**30:.1f} GiB in all; {folder} has {free / 2**30:.1f} GiB "
        "free: free some, or lower run.keep_checkpoints"
    )


def _device_gib(device: torch.device, num_on_host: int) -> float | None:
    """Memory that this process could use, in GiB: a GPU's total; on a CPU what is free and what it holds already.

    ``num_on_host``: ranks that share the machine's memory.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / GIB
    free_gib, (own_gib, _) = machine.available_gib(), process_memory_gib()
    return None if free_gib is None or own_gib is None else free_gib / num_on_host + own_gib


def _planned(facts: Facts) -> dict[str, Any]:
    return {
        "arenas_gib": {a.name: a.num_bytes / GIB for a in memory_uses(facts)},
        "when": {a.name: list(a.moments) for a in memory_uses(facts)},
        "host": [a.name for a in memory_uses(facts) if a.is_host],
        "peak_gib": {moment: peak_bytes(facts, moment) / GIB for moment in MOMENTS},
        "largest_micro_tok": largest_micro_tok(facts),
        "largest_kv_tok": largest_kv_tok(facts) if facts.is_sampled else None,
        "tok": {"prompt": facts.prompt_tok, "response": facts.response_tok, "micro_batch": facts.micro_tok},
    }


def _prompt_tok(recipe: Recipe, stage: StageRecipe) -> float:
    """Prompt length, in tokens: of files the most that is allowed, of generated questions the mean over samples."""
    lengths = []
    for part in stage.mixture:
        data = recipe.data[part.data]
        if isinstance(data, GeneratedData):
            tasks = data.tasks(part.representation, NUM_SAMPLES, seed=0, split="train")
            lengths.append(sum(1 + len(re.findall(WORD, task.question)) for task in tasks) / len(tasks))
        else:
            lengths.append(float(data.max_prompt_tok))
    last = [part.weight if part.weight_end is None else part.weight_end for part in stage.mixture]
    weights = [part.weight + end for part, end in zip(stage.mixture, last, strict=True)]  # of a fade, on average
    return sum(w * n for w, n in zip(weights, lengths, strict=True)) / sum(weights)


def size_text(gib: float) -> str:
    return f"{gib:.1f} GiB" if gib >= 1 else f"{gib * 1024:.1f} MiB"


class FirstSteps:
    """Log sink that compares estimate and measurement once per stage, with the lengths that occurred.

    It does so on the stage's second step with an update: before the first there are no moments, and caches are cold. It
    measures the first of several ranks, and assumes an equal share of the row's counts for each.
    """

    def __init__(self, recipe: Recipe, policy: Policy, log: RunLog, before_gib: float | None, num_ranks: int) -> None:
        self.recipe, self.log, self.before_gib, self.num_ranks = recipe, log, before_gib, num_ranks
        self.shape, self.device = shape_of(policy.model), policy.device
        self.ceilings = measure_ceilings(policy.device, policy.dtype)
        run = json.loads((log.folder / "run.json").read_text())
        self.compared: dict[str, Any] = run.get("plan", {})  # by stage; also what a resumed run had compared before
        self.warm: set[str] = set()  # stages that have been updated

    def __call__(self, row: Row) -> None:
        if not row.get("updates") or row["stage"] in self.compared:  # an evaluation has none
            return
        if row["stage"] not in self.warm:
            self.warm.add(row["stage"])
            return
        stage = next(s for s in self.recipe.stage if s.name == row["stage"])
        facts = self._facts(row, stage)
        is_gpu = self.device.type == "cuda"
        peak = max(peak_bytes(facts, moment) for moment in MOMENTS) / GIB
        measured = row["mem/gpu_peak_gib"] if is_gpu else row["mem/peak_rss_gib"]
        times = seconds(facts, self.ceilings)
        compared = {"peak_gib": [peak, measured], **{f"{p}_s": [times[p], row[f"time/{p}_s"]] for p in times}}
        self.compared[stage.name] = {name: {"plan": planned, "fact": got} for name, (planned, got) in compared.items()}
        run = self.log.folder / "run.json"
        self.log.write_json("run.json", {**json.loads(run.read_text()), "plan": self.compared})
        pairs = (f"{name} {p:.2f}/{'-' if f is None else format(f, '.2f')}" for name, (p, f) in compared.items())
        self.log.say(f"estimated/measured, stage {stage.name}: {'  '.join(pairs)}")

    def _facts(self, row: Row, stage: StageRecipe) -> Facts:
        facts = facts_of(
            self.recipe,
            stage,
            self.shape,
            prompt_tok=1,
            device_gib=0,
            is_gpu=self.device.type == "cuda",
            num_ranks=self.num_ranks,
        )
        num_responses = row["groups/all"] * facts.samples
        prompts = -(-row["groups/all"] // self.num_ranks)
        was_saved = (row["step"] - 1) % self.recipe.run.checkpoint_every == 0
        facts = dataclasses.replace(
            facts,
            prompts=prompts,
            drawn_prompts=prompts,
            process_gib=self.before_gib,
            copies_checkpoint=facts.copies_checkpoint and was_saved,
            prompt_tok=row["tok/prompt"] / row["groups/all"],
            response_tok=(row["tok/response"] + row["tok/context"]) / num_responses,
        )
        own_tok = row["tok/trunk"] / row["updates"] / self.num_ranks
        return dataclasses.replace(facts, micro_tok=min(stage.batch.micro_batch_tok, own_tok))
