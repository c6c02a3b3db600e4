"""``isomorph plan``: a recipe's estimated memory and time, before it runs."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from isomorph.curriculum.estimate import plan_recipe, size_text
from isomorph.curriculum.named_recipes import recipe_path
from isomorph.curriculum.recipe import Recipe
from isomorph.engine.planner import MOMENTS
from isomorph.engine.recipe_file import load_recipe


def plan(
    recipe: Path,
    overrides: Sequence[str],
    device: str | None,
    device_gib: float | None,
    ranks: int,
    console: Console,
    *,
    as_json: bool,
) -> None:
    """Prints the estimate of every stage; the arguments are the options of the command. Raises UserError."""
    planned = plan_recipe(load_recipe(recipe_path(recipe), list(overrides), Recipe), device, device_gib, ranks)
    if as_json:
        sys.stdout.write(json.dumps(planned, indent=2) + "\n")
    else:
        show_plan(planned, console)


def show_plan(planned: dict[str, Any], console: Console) -> None:
    """Prints two tables with a column per stage: memory by use; largest sizes and a lower bound of the seconds."""
    stages, size = planned["stages"], planned["model"]["num_parameters"]
    one_of = "" if planned["num_ranks"] == 1 else f"one of {planned['num_ranks']} ranks: "
    heading = f"{one_of}{planned['device']}, {planned['device_gib']:.1f} GiB; {size / 1e9:.3f} B parameters"
    if (trained := planned["model"]["num_trained"]) < size:
        heading += f", {trained / 1e6:.1f} M trained"
    memory = _table(heading, "memory", stages)
    for name in dict.fromkeys(name for stage in stages for name in stage["arenas_gib"]):
        when = next(stage["when"][name] for stage in stages if name in stage["when"])
        place = " (host)" if name in stages[0]["host"] or any(name in s["host"] for s in stages) else ""
        cells = [size_text(s["arenas_gib"][name]) if name in s["arenas_gib"] else "-" for s in stages]
        memory.add_row(name + place, "always" if len(when) == len(MOMENTS) else ", ".join(when), *cells)
    memory.add_section()
    for moment in MOMENTS:
        peaks = [_peak(stage["peak_gib"][moment], planned["device_gib"]) for stage in stages]
        memory.add_row(f"peak, {moment}", "", *peaks)
    console.print(memory)
    rest = _table("largest sizes that fit, and the fewest seconds a step can take", "", stages)
    rest.add_row("largest batch.micro_batch_tok", "tokens", *(f"{s['largest_micro_tok']:,}" for s in stages))
    rest.add_row("micro-batch", "tokens", *(f"{s['tok']['micro_batch']:,.0f}" for s in stages))
    kv = ("-" if s["largest_kv_tok"] is None else f"{s['largest_kv_tok']:,}" for s in stages)
    rest.add_row("largest KV cache", "tokens", *kv)
    for phase in ("generate", "update"):
        rest.add_row(phase, "s/step", *(f"{stage['seconds'][phase]:,.1f}" for stage in stages))
    console.print(rest)
    console.print(_ranks_table(planned))
    _print_remedies(stages, console)
    ceilings = planned["ceilings"]
    console.print(
        f"peak rates assumed: {ceilings['flops'] / 1e12:.2f} TFLOP/s, {ceilings['bandwidth'] / 1e9:,.0f} GB/s "
        f"({ceilings['source']}); seconds are a lower bound: no launch overhead, communication or stragglers; all "
        "responses are assumed to have sampling.max_new_tok tokens",
        highlight=False,
    )


def _table(title: str, unit: str, stages: list[dict[str, Any]]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column(unit)
    table.add_column("")
    for stage in stages:
        table.add_column(stage["stage"], justify="right")
    return table


def _ranks_table(planned: dict[str, Any]) -> Table:
    """The highest peak of each stage by number of ranks and way of dividing; below it what FSDP2 is refused for."""
    table = _table("highest peak of a rank, and what it sends to others in a step", "ranks", planned["stages"])
    for row in planned["ranks"]:
        cells: list[Text] = [Text("refused")] * len(planned["stages"])
        if row["peak_gib"]:
            cells = [
                _peak(gib, row["device_gib"]).append(f" + {size_text(sent)} sent" if sent else "", style="")
                for gib, sent in zip(row["peak_gib"], row["network_gib"], strict=True)
            ]
        table.add_row(str(row["ranks"]), row["kind"], *cells)
    if refused := next((row["refused"] for row in planned["ranks"] if row["refused"]), None):
        table.caption, table.caption_justify = refused, "left"
    return table


def _print_remedies(stages: list[dict[str, Any]], console: Console) -> None:
    for stage in stages:
        if stage["fits"]:
            continue
        lines = [f"stage {stage['stage']} does not fit. Changes, the peak with each, and what it costs:"]
        for remedy in stage["remedies"]:
            verdict = "fits" if remedy["is_enough"] else "not enough alone"
            lines.append(f"  {size_text(remedy['peak_gib'])}, {verdict}:")
            pairs = zip(remedy["write"], remedy["costs"], strict=True)
            lines += [f"    {write}   ({cost})" for write, cost in pairs]
        if not any(remedy["is_enough"] for remedy in stage["remedies"]):
            lines.append("  none of them is enough, nor are they together: choose a smaller model or a larger device")
        console.print("\n".join(lines), highlight=False, soft_wrap=True, markup=False)


def _peak(gib: float, device_gib: float) -> Text:
    return Text(size_text(gib)) if gib <= device_gib else Text(f"{size_text(gib)}, does not fit", style="red")
