"""Tables of whole steps and their parts: a step, an update, TRL's own trainer packed, decoding, publishing."""

import statistics

from table_rows import OURS, Row, grouped, is_gpu, latest_of, markdown_table, ratio_text, titled_part

STEP_KEY = ("machine", "model", "sampler", "kl", "prompts", "group", "max_new_tok", "trl_generation")


def steps(rows: list[Row]) -> list[str]:
    latest = latest_of((row for row in rows if row["who"] == "ratio"), "dtype", *STEP_KEY)
    return [_step(alike) for alike in grouped(latest, *STEP_KEY)]


def _step(rows: list[Row]) -> str:
    row = rows[0]
    on_gpu = is_gpu(row["machine"])
    says = (
        f"{row['model']}, sampler {row['sampler']}, KL {row['kl']:g}, {row['prompts']} prompts of {row['group']} "
        f"completions, at most {row['max_new_tok']} tokens each; {row['machine']}; torch {row['torch']}; "
        f"{row['date']}. Both sides in turns of one run; {'seconds' if on_gpu else 'times in multiples of our step'}, "
        f"medians of {row['turns'] - 1} turns."
    )
    head = (
        *("Dtype", "", "TRL's step over ours, turn by turn", "Step", "Generate", "Rest"),
        *("Completion tok", "All tok", "Peak MiB above rest", "Padding"),
    )
    lines = [line for row in rows for line in _step_lines(row, 1.0 if on_gpu else row[OURS]["step_s"])]
    return titled_part("One GRPO step beside TRL", says, markdown_table(head, lines), rows)


def _step_lines(row: Row, one: float) -> list[tuple[str, ...]]:
    ratios = row["ratios"]
    beside = f"**{statistics.median(ratios):.1f}** ({min(ratios):.1f} to {max(ratios):.1f})"
    return [
        (row["dtype"], "TRL", beside, *_anatomy(row["trl"], one)),
        (row["dtype"], OURS, "", *_anatomy(row[OURS], one)),
    ]


def _anatomy(side: Row, one: float) -> tuple[str, ...]:
    step, generate = side["step_s"], side["generate_s"]
    return (
        *(f"{seconds / one:.2f}" for seconds in (step, generate, step - generate)),
        *(f"{side[name]:.0f}" for name in ("completion_tok", "all_tok", "peak_mib")),
        f"{100 * side['padding_share']:.0f} %",
    )


def updates(rows: list[Row]) -> list[str]:
    latest = latest_of((row for row in rows if row["who"] == "ratio"), "machine", "dtype")
    return [_update(alike) for alike in grouped(latest, "machine")]


def _update(rows: list[Row]) -> str:
    row = rows[0]
    says = (
        "The prompt of a group computed once, beside the same update with the prompt repeated for each response; "
        f"{row['machine']}; torch {row['torch']}; {row['date']}."
    )
    head = ("Dtype", "Times as fast", "Times less memory above what is at rest")
    lines = [(row["dtype"], f"**{row['speed']:.1f}**", ratio_text(row["memory"])) for row in rows]
    return titled_part("One update with shared prompts", says, markdown_table(head, lines), rows)


def adapted(rows: list[Row]) -> list[str]:
    sizes = ("machine", "model", "groups", "group", "prompt_tok", "response_tok")
    latest = latest_of((row for row in rows if row["who"] == "ratio"), "dtype", *sizes)
    return [_packed_trl(alike) for alike in grouped(latest, *sizes)]


def _packed_trl(rows: list[Row]) -> str:
    row = rows[0]
    says = (
        f"`pack_groups(trainer)` beside TRL as it comes: forward and backward of a micro-batch of {row['model']}, "
        f"{row['groups']} prompts of {row['prompt_tok']} tokens with {row['group']} responses of at most "
        f"{row['response_tok']}; {row['machine']}; torch {row['torch']}; {row['date']}."
        f"{'' if is_gpu(row['machine']) else ' Without a GPU TRL scores every position, those of prompts included.'}"
    )
    head = ("Dtype", "Times as fast", "p20 to p80", "Times less memory above what is at rest")
    lines = [
        (r["dtype"], f"**{r['ratio']:.1f}**", f"{r['low']:.1f} to {r['high']:.1f}", ratio_text(r["memory"]))
        for r in rows
    ]
    return titled_part("TRL's own trainer, packed", says, markdown_table(head, lines), rows)


def decoding(rows: list[Row]) -> list[str]:
    latest = latest_of(rows, "machine", "seqs", "dtype", "provider")
    return [_decoded(alike) for alike in grouped(latest, "machine", "seqs")]


def _decoded(rows: list[Row]) -> str:
    row = rows[0]
    peers = tuple(dict.fromkeys(row["provider"] for row in rows if row["provider"] != OURS))
    ours_over = {(row["dtype"], row["provider"]): _decoding_ratio(row) for row in rows}
    dtypes = dict.fromkeys(row["dtype"] for row in rows)
    lines = [(dtype, *(ours_over.get((dtype, peer), "not measured") for peer in peers)) for dtype in dtypes]
    says = (
        f"{row['seqs']} sequences, tokens a second of the built-in sampler over those of others; {row['machine']}; "
        f"{row['time'][:10]}. Bare products: the decoder's matrix products by PyTorch and nothing else."
    )
    return titled_part("Decoding", says, markdown_table(("Dtype", *peers), lines), rows)


def _decoding_ratio(row: Row) -> str:
    return f"{row['ours_over_this']:.2f}" if row["status"] == "ok" else f"absent ({row['reason']})"


def publishing(rows: list[Row]) -> list[str]:
    latest = latest_of(rows, "machine", "mode", "dtype")
    return [_published(alike) for alike in grouped(latest, "machine", "parameters", "seqs", "new_tok")]


def _published(rows: list[Row]) -> str:
    row = rows[0]
    says = (
        f"{row['parameters'] / 1e6:.0f} M parameters to vLLM, in percent of the time of drawing {row['seqs']} "
        f"sequences of {row['new_tok']} tokens; {row['machine']}; {row['time'][:10]}. The probe is drawn at the start "
        "and before an exam, the rest at every step."
    )
    lines = [
        (
            *(row["mode"], row["dtype"], f"{row['publish_bytes'] / 1e6:.0f}", _share(row, "move_s")),
            *(_share(row, "fingerprint_s", "check_s"), _share(row, "probe_s")),
        )
        for row in rows
    ]
    head = ("Mode", "Dtype", "MB moved", "Moving", "Both fingerprints", "Probe")
    return titled_part("Publishing weights", says, markdown_table(head, lines), rows)


def _share(row: Row, *parts: str) -> str:
    return f"{100 * sum(row[part] for part in parts) / row['generate_s']:.2g} %"
