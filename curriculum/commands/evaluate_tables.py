"""The tables that ``isomorph eval`` prints."""

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from isomorph.engine.foreign import printable


def show_scores(result: dict[str, Any], console: Console) -> None:
    """Prints the results of one model."""
    scores = result["results"]
    table = Table(title=Text(printable(f"{result['weights']}, {_how(result)}")), title_justify="left")
    means = _means(scores[0])
    has_rewards = _has_rewards(scores)
    columns = ["data", "accuracy", "95 % interval", *(["reward"] if has_rewards else []), *means]
    for column in (*columns, "sequential baseline", "best shortcut", "no answer", "questions", "ended"):
        table.add_column(column, justify="left" if column == "data" else "right")
    for score in scores:
        table.add_row(
            Text(printable(score["data"])),
            *_accuracy(score),
            *([_known(score["reward"], ".3f")] if has_rewards else []),
            *(_interval(score[name]) for name in means),
            _known(score["floor"], ".1%"),
            _known(max(score["shortcuts"].values(), default=None), ".1%"),
            _known(score["no_answer"], ".1%"),
            str(score["n"]),
            f"{score['stopped']:.0%}",
        )
    console.print(table)
    num_tok, seconds = (sum(score[key] for score in scores) for key in ("tokens", "generate_s"))
    console.print(
        "sequential baseline: accuracy of answering with the sum of all durations; best shortcut: of the best answer "
        "that does not plan; ended: share of responses that ended before the length limit",
        highlight=False,
    )
    console.print(f"{num_tok} tokens in {seconds:.1f} s: {num_tok / seconds:.0f} tokens/s", highlight=False)


def show_comparison(results: dict[str, Any], console: Console) -> None:
    """Prints several models in one table, with the difference of each from the first."""
    models = results["models"]
    table = Table(title=Text(printable(f"{len(models)} models, {_how(models[0])}")), title_justify="left")
    means = _means(models[0]["results"][0])
    has_rewards = any(_has_rewards(model["results"]) for model in models)
    columns = ["data", "model", "accuracy", "95 % interval", *(["reward"] if has_rewards else []), *means]
    for column in (*columns, "difference, points", "p"):
        is_name = column in ("data", "model")  # in a narrow terminal names are broken, not cut
        table.add_column(column, justify="left" if is_name else "right", overflow="fold" if is_name else "ellipsis")
    for i in range(len(models[0]["results"])):
        for j, model in enumerate(models):
            score = model["results"][i]
            paired = results["comparisons"][j - 1]["results"][i] if j else None
            table.add_row(
                Text(printable(score["data"]) if j == 0 else ""),
                Text(printable(model["target"])),
                *_accuracy(score),
                *([_known(score["reward"], ".3f")] if has_rewards else []),
                *(_interval(score[name]) for name in means),
                _points(paired["accuracy"]) if paired else "-",
                f"{paired['p']:.2g}" if paired else "-",
                end_section=j == len(models) - 1,
            )
    console.print(table)
    console.print(
        "difference: of greedy accuracy from the first model on the same questions; its 95 % interval by a bootstrap "
        "over questions; p: exact McNemar test, two-sided",
        highlight=False,
    )


def _how(result: dict[str, Any]) -> str:
    samples = f", {result['samples']} samples at {result['sample_temperature']:g}" if result.get("samples") else ""
    return f"greedy{samples}, at most {result['max_new_tok']} new tokens"


def _accuracy(score: dict[str, Any]) -> tuple[str, str]:
    return f"{score['rate']:.1%}", f"{score['low']:.1%} to {score['high']:.1%}"


def _has_rewards(scores: list[dict[str, Any]]) -> bool:
    """Whether a mean reward says more than the accuracy."""
    return any(score["reward"] not in (None, score["rate"]) for score in scores)


def _means(score: dict[str, Any]) -> list[str]:
    return [name for name in score if name.startswith(("avg@", "pass@"))]


def _interval(mean: dict[str, float]) -> str:
    return f"{mean['rate']:.1%} ({mean['low']:.1%} to {mean['high']:.1%})"


def _points(paired: dict[str, float]) -> str:
    return f"{100 * paired['difference']:+.1f} ({100 * paired['low']:+.1f} to {100 * paired['high']:+.1f})"


def _known(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
