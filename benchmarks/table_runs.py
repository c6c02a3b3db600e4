"""Tables of whole steps and their parts: a step, an update, TRL's own trainer packed, decoding, weight sync."""

import statistics
from collections.abc import Iterable

from table_rows import (
    NOT_MEASURED,
    OURS,
    Headline,
    Row,
    dates,
    grouped,
    is_gpu,
    latest_of,
    markdown_table,
    marked,
    ratio_text,
    titled_part,
)

STEP_KEY = ("machine", "model", "sampler", "kl", "prompts", "group", "max_new_tok", "trl_generation", "trl_liger")
ADAPTER_KEY = ("machine", "model", "groups", "group", "prompt_tok", "response_tok")
STEP, UPDATE, ADAPTER = "One GRPO step beside TRL", "One update with shared prompts", "TRL's own trainer, packed"
DECODING, SYNC = "Decoding", "Weight sync"
MATMULS = "bare products"  # a provider of bench_sampler.py
SHOWN = {MATMULS: "matmuls only (PyTorch's default backend)"}


def runs(step: list[Row], update: list[Row], adapter: list[Row], sampler: list[Row], publish: list[Row]) -> list[str]:
    """A titled part for each benchmark and machine, with its commands."""
    return [
        *(_step(rows) for rows in grouped(_ratios(step, *STEP_KEY), *STEP_KEY)),
        *(_update(rows) for rows in grouped(_ratios(update, "machine"), "machine")),
        *(_adapter(rows) for rows in grouped(_ratios(adapter, *ADAPTER_KEY), *ADAPTER_KEY)),
        *(_decoding(rows) for rows in grouped(_decoded(sampler), "machine", "seqs")),
        *(_sync(rows) for rows in grouped(_published(publish), "machine", "parameters", "seqs", "new_tok")),
    ]


def headlines(step: list[Row], update: list[Row], adapter: list[Row], sampler: list[Row]) -> list[Headline]:
    """The README's rows: a step, an update, TRL's trainer, decoding beside vLLM."""
    found = []
    for rows in grouped(_ratios(step, *STEP_KEY), *STEP_KEY):
        row = rows[0]
        what = f"GRPO step, {row['model']}, {row['prompts']} prompts of {row['group']} completions"
        speed = {row["dtype"]: _marked_spread(row["ratios"]) for row in rows}
        memory = {row["dtype"]: marked(row["trl"]["peak_mib"] / row[OURS]["peak_mib"]) for row in rows}
        liger = ", with Liger's layers" if row["trl_liger"] else ""
        other = f"TRL's GRPOTrainer, generating by {row['trl_generation']}{liger}"
        found.append(Headline(row["machine"], what, other, speed, memory, STEP, dates(rows)))
    for rows in grouped(_ratios(update, "machine"), "machine"):
        speed, memory = ({row["dtype"]: marked(row[name]) for row in rows} for name in ("speed", "memory"))
        what, other = "update, prompt of a group computed once", "prompt repeated for each response"
        found.append(Headline(rows[0]["machine"], what, other, speed, memory, UPDATE, dates(rows)))
    for rows in grouped(_ratios(adapter, *ADAPTER_KEY), *ADAPTER_KEY):
        speed = {row["dtype"]: f"{marked(row['ratio'])} ({row['low']:.2f} to {row['high']:.2f})" for row in rows}
        memory = {row["dtype"]: marked(row["memory"]) for row in rows if row["memory"] is not None}
        what, other = "TRL's forward and backward with `pack_groups`", "TRL as it is"
        found.append(Headline(rows[0]["machine"], what, other, speed, memory, ADAPTER, dates(rows)))
    for rows in grouped((row for row in _decoded(sampler) if row["provider"] == "vllm"), "machine", "seqs"):
        speed = {row["dtype"]: marked(row["ours_over_this"]) for row in rows if row["status"] == "ok"}
        what = f"decoding {rows[0]['seqs']} sequences, built-in sampler"
        found.append(Headline(rows[0]["machine"], what, "vLLM", speed, {}, DECODING, dates(rows)))
    return found


def _ratios(rows: Iterable[Row], *names: str) -> list[Row]:
    return latest_of((row for row in rows if row["who"] == "ratio"), "dtype", *names)


def _decoded(rows: list[Row]) -> list[Row]:
    return latest_of(rows, "machine", "seqs", "dtype", "provider")


def _published(rows: list[Row]) -> list[Row]:
    return latest_of(rows, "machine", "parameters", "seqs", "new_tok", "mode", "dtype")


def _spread(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})"


def _marked_spread(ratios: list[float]) -> str:
    return f"{marked(statistics.median(ratios))} ({min(ratios):.2f} to {max(ratios):.2f})"


def _step(rows: list[Row]) -> str:
    row = rows[0]
    on_gpu = is_gpu(row["machine"])
    says = (
        f"{row['model']}, sampler {row['sampler']}, KL {row['kl']:g}, {row['prompts']} prompts of {row['group']} "
        f"completions, at most {row['max_new_tok']} tokens each; {row['machine']}; torch {row['torch']}; "
        f"{dates(rows)}. isomorph and TRL alternate in one process, {row['turns'] - 1} rounds after one that is not "
        f"counted; {'seconds' if on_gpu else 'times are multiples of our step'}, medians over the rounds."
    )
    head = (
        *("Dtype", "", "TRL's step / ours, per round", "Step", "Generation", "Update and other"),
        *("Completion tokens", "All tokens", "Peak MiB above idle", "Padding"),
    )
    lines = [line for row in rows for line in _step_lines(row, 1.0 if on_gpu else row[OURS]["step_s"])]
    return titled_part(STEP, says, markdown_table(head, lines), rows)


def _step_lines(row: Row, one: float) -> list[tuple[str, ...]]:
    median, _, spread = _spread(row["ratios"]).partition(" ")
    return [
        (row["dtype"], "TRL", f"**{median}** {spread}", *_breakdown(row["trl"], one)),
        (row["dtype"], OURS, "", *_breakdown(row[OURS], one)),
    ]


def _breakdown(side: Row, one: float) -> tuple[str, ...]:
    step, generate = side["step_s"], side["generate_s"]
    return (
        *(f"{seconds / one:.2f}" for seconds in (step, generate, step - generate)),
        *(f"{side[name]:.0f}" for name in ("completion_tok", "all_tok", "peak_mib")),
        f"{100 * side['padding_share']:.0f} %",
    )


def _update(rows: list[Row]) -> str:
    row = rows[0]
    says = (
        "One optimizer step with each prompt computed once per group, beside the same step with the prompt repeated "
        f"for each response; {row['machine']}; torch {row['torch']}; {dates(rows)}."
    )
    head = ("Dtype", "Times faster", "Times less memory above idle")
    lines = [(row["dtype"], f"**{row['speed']:.1f}**", ratio_text(row["memory"])) for row in rows]
    return titled_part(UPDATE, says, markdown_table(head, lines), rows)


def _adapter(rows: list[Row]) -> str:
    row = rows[0]
    says = (
        f"`pack_groups(trainer)` beside TRL as it is: forward and backward of a micro-batch of {row['model']}, "
        f"{row['groups']} prompts of {row['prompt_tok']} tokens with {row['group']} responses of at most "
        f"{row['response_tok']}; {row['machine']}; torch {row['torch']}; {dates(rows)}."
        f"{'' if is_gpu(row['machine']) else ' Without a GPU TRL scores every position, prompts included.'}"
    )
    head = ("Dtype", "Times faster", "p20 to p80", "Times less memory above idle")
    lines = [
        (r["dtype"], f"**{r['ratio']:.1f}**", f"{r['low']:.1f} to {r['high']:.1f}", ratio_text(r["memory"]))
        for r in rows
    ]
    return titled_part(ADAPTER, says, markdown_table(head, lines), rows)


def _decoding(rows: list[Row]) -> str:
    row = rows[0]
    peers = tuple(dict.fromkeys(row["provider"] for row in rows if row["provider"] != OURS))
    ours_over = {(row["dtype"], row["provider"]): _throughput_ratio(row) for row in rows}
    dtypes = dict.fromkeys(row["dtype"] for row in rows)
    lines = [(dtype, *(ours_over.get((dtype, peer), NOT_MEASURED) for peer in peers)) for dtype in dtypes]
    says = (
        f"{row['seqs']} sequences. Throughput (tokens per second) of the built-in sampler divided by the other's: "
        f"below 1 the other is faster; {row['machine']}; {dates(rows)}."
    )
    if MATMULS in peers:
        says += (
            " Matmuls only: the decoder's matrix products and nothing else, by PyTorch's default backend. Where the "
            "sampler multiplies by another backend (oneDNN), it can be faster than that."
        )
    head = ("Dtype", *(SHOWN.get(peer, peer) for peer in peers))
    return titled_part(DECODING, says, markdown_table(head, lines), rows)


def _throughput_ratio(row: Row) -> str:
    return f"{row['ours_over_this']:.2f}" if row["status"] == "ok" else f"absent ({row['reason']})"


def _sync(rows: list[Row]) -> str:
    row = rows[0]
    says = (
        f"Weights of {row['parameters'] / 1e6:.0f} M parameters to vLLM in the same process, in percent of the time "
        f"of sampling {row['seqs']} sequences of {row['new_tok']} tokens; {row['machine']}; {dates(rows)}. The weight "
        "hash is taken at every step; the probe (log-probabilities of a few sampled tokens) at the start and before an "
        "evaluation."
    )
    lines = [
        (
            *(row["mode"], row["dtype"], f"{row['publish_bytes'] / 1e6:.0f}", _share(row, "move_s")),
            *(_share(row, "fingerprint_s", "check_s"), _share(row, "probe_s")),
        )
        for row in rows
    ]
    head = ("Mode", "Dtype", "MB copied", "Copying", "Weight hash of both sides", "Probe")
    return titled_part(SYNC, says, markdown_table(head, lines), rows)


def _share(row: Row, *parts: str) -> str:
    return f"{100 * sum(row[part] for part in parts) / row['generate_s']:.2g} %"
