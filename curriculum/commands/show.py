"""``isomorph show``: responses of a run in the terminal, right and wrong ones alternating."""

from collections.abc import Sequence
from itertools import chain, zip_longest
from pathlib import Path

from rich.console import Console, Group
from rich.panel import Panel
from rich.rule import Rule
from rich.text import Text

from isomorph.curriculum.report.run_record import read_completions, read_run_json, reward_text
from isomorph.engine.config import UserError
from isomorph.engine.foreign import printable
from isomorph.engine.record.runlog import Row

MAX_PROMPT_CHARS = 1_500


def show_responses(run: Path, step: int | None, num: int, console: Console) -> None:
    """Prints ``num`` responses per representation, of ``step`` or of the newest file under completions/.

    Raises:
        UserError: ``run`` is no run folder, or there is nothing to show.
    """
    read_run_json(run)  # raises where it is no run folder
    file = _completions_file(run, step)
    rows = read_completions(file)
    if rows is None:
        raise UserError(f"{file} is incomplete: wait until it is written, or name another step")
    console.print(Text(printable(f"{run.name}: {file.stem}"), style="bold"))
    for representation in dict.fromkeys(row["representation"] for row in rows):
        responses = [row for row in rows if row["representation"] == representation]
        rate = sum(row["correct"] for row in responses) / len(responses)
        none = sum(row.get("answered") is False for row in responses) / len(responses)
        facts = f"{len(responses)} responses, {rate:.0%} right" + (f", {none:.0%} without an answer" if none else "")
        console.print(Rule(Text(printable(f"{representation}: {facts}"))))
        for row in _right_and_wrong_alternating(responses)[:num]:
            console.print(_panel(row))


def _completions_file(run: Path, step: int | None) -> Path:
    folder = run / "completions"
    files = sorted(folder.glob("*.jsonl"), key=lambda file: file.stat().st_mtime_ns)
    if not files:
        raise UserError(f"{folder} holds no responses yet: they are written every run.completions_every steps")
    if step is None:
        return files[-1]
    file = folder / f"step-{step:08d}.jsonl"
    if file not in files:
        steps = sorted(int(f.stem.removeprefix("step-")) for f in files if f.stem.startswith("step-"))
        raise UserError(
            f"{run} holds no responses of step {step}, only of {', '.join(map(str, steps)) or 'no step'} "
            "(they are written every run.completions_every steps)"
        )
    return file


def _right_and_wrong_alternating(rows: Sequence[Row]) -> list[Row]:
    right, wrong = ([row for row in rows if row["correct"] is wanted] for wanted in (True, False))
    return [row for row in chain.from_iterable(zip_longest(right, wrong)) if row is not None]


def _panel(row: Row) -> Panel:
    """Text is used because it parses no markup; ``printable`` escapes the terminal's control characters."""
    prompt = row["prompt"] if len(row["prompt"]) <= MAX_PROMPT_CHARS else row["prompt"][:MAX_PROMPT_CHARS] + " .."
    facts = [reward_text(row)]
    facts += [f"advantage {row['advantage']:+.2f}"] if row.get("advantage") is not None else []
    facts += ["no answer found"] if row.get("answered") is False else []
    facts += ["cut off at max_new_tok"] if row.get("finish") == "length" else []
    style = "green" if row["correct"] else "red"
    body = Group(Text(printable(prompt), style="dim"), Text(), Text(printable(row["text"])))
    return Panel(body, title=Text(f"prompt {row['prompt_id']}"), subtitle=Text(", ".join(facts)), border_style=style)
