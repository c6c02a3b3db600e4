"""The report page: its parts, its figures, runs that are not finished, and folders that are no runs."""

import base64
import dataclasses
import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import simulated_study
from long_runs import long_run, several
from matplotlib.colors import to_hex
from tiny_runs import summary_of

from isomorph.curriculum.report import figures
from isomorph.curriculum.report.answer import changes
from isomorph.curriculum.report.drawing import (
    MAX_POINTS,
    NARROW_IN,
    WIDTH_IN,
    as_label,
    moving_average,
    new_figure,
    thinned,
)
from isomorph.curriculum.report.page import write_report
from isomorph.curriculum.report.run_record import RunRecord, read_run, trained_on
from isomorph.curriculum.report.vector import DARK_PAGE, LIGHT_PAGE, dark, themed_svg
from isomorph.curriculum.rewards.pool import answer_found
from isomorph.curriculum.study.page import write_study
from isomorph.engine.config import UserError

PNG = b"\x89PNG\r\n\x1a\n"
WIDTHS = (360, 768, 1400)  # pixels of a screen
PICTURES = ("evaluations", "transfer", "reward", "health", "phases")


class Page(HTMLParser):
    """Collects tables and sources, and checks that every element is closed in order."""

    VOID = ("meta", "img", "br", "source")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for name, value in attrs if name in ("src", "href", "srcset")]
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if {"td", "th"} & set(self.open):  # a cell may hold an interval of its own
            self.tables[-1][-1][-1] += data

    def table(self, corner: str) -> list[list[str]]:
        return next(table for table in self.tables if table[0][0] == corner)


@pytest.fixture(scope="module")
def page(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report([finished_run], tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def compared(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of three runs: of one recipe, and of two seeds of another."""
    folder = tmp_path_factory.mktemp("compared")
    return write_report(several(finished_run, folder, num=3, steps=83), folder / "out")


@pytest.fixture
def copy(finished_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished_run, tmp_path / "copy"))


def steps_of(run: Path, name: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "steps.jsonl").read_text().splitlines()]
    return [row for row in rows if row["stage"] == name]


def drawings_of(text: str) -> list[str]:
    """The drawings of a page: for each figure that of a narrow screen, then the wide one."""
    sources = Page(text).sources
    assert all(source.startswith("data:image/svg+xml;base64,") for source in sources)
    return [base64.b64decode(source.partition(",")[2]).decode() for source in sources]


def test_the_page_stands_alone(page: Path) -> None:
    text = page.read_text()
    drawings = drawings_of(text)
    assert len(drawings) == 2 * len(PICTURES)
    assert not re.search(r"https?:|//[a-z]|<script|<link|@import|url\(", text.split("base64,")[0], re.IGNORECASE)
    assert "<script" not in text and "http" not in re.sub(r"base64,[^\"]*", "", text)
    for drawing in drawings:  # names of formats are addresses, but nothing is fetched from them
        left = re.sub(r' xmlns(:xlink)?="http://www.w3.org/[0-9/a-z]*"', "", drawing)
        assert not re.search(r"https?:|<script|<image|<!DOCTYPE|@import|url\((?!#)", left)
        assert {ref[0] for ref in re.findall(r'href="(.)', left)} <= {"#"}


def test_every_picture_is_in_the_page_and_beside_it(page: Path) -> None:
    files = {file.stem: file.read_bytes() for file in page.parent.glob("*.png")}
    assert set(files) == set(PICTURES)
    assert all(data.startswith(PNG) for data in files.values())
    widths = [float(re.findall(r'viewBox="0 0 ([0-9.]+)', drawing)[0]) for drawing in drawings_of(page.read_text())]
    assert widths == pytest.approx([72 * NARROW_IN, 72 * WIDTH_IN] * len(PICTURES))


def test_pictures_have_colours_for_a_dark_page(page: Path) -> None:
    for drawing in drawings_of(page.read_text()):
        assert "@media (prefers-color-scheme: dark)" in drawing
        styles = re.findall(r'style="([^"]*)"', drawing)
        assert styles and not any(re.search("#[0-9a-f]{6}", style) for style in styles)  # variables of both themes


@pytest.mark.parametrize("light", [*figures.COLOUR_OF.values(), *figures.RUN_COLOURS, "#000000", "#222222", "#555555"])
def test_lines_and_letters_are_visible_on_a_dark_page(light: str) -> None:
    assert contrast(dark(light.lower()), DARK_PAGE) > 3  # WCAG 2.2, 1.4.11: graphical objects


def test_backgrounds_stay_near_the_page() -> None:
    assert dark(LIGHT_PAGE) == DARK_PAGE
    assert contrast(dark("#f0f0f0"), DARK_PAGE) < 1.5 > contrast(dark("#dddddd"), DARK_PAGE) > 1


def contrast(first: str, second: str) -> float:
    """WCAG's contrast of two colours, 1 to 21."""
    light, less = sorted((luminance(first), luminance(second)), reverse=True)
    return (light + 0.05) / (less + 0.05)


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_the_answer_comes_first(page: Path, finished_run: Path) -> None:
    text, summary = page.read_text(), summary_of(finished_run)
    assert text.index("Did it learn, and what carried over?") < text.index("<figure>") < text.index("The run</h3>")
    head, *rows = Page(text).table("accuracy")
    assert head == ["accuracy", "before (warm-up)", "after (words)", "change, points"]
    trained = {"natural", "graph", "code"}  # by the stages after the warm-up
    assert [row[0] for row in rows] == [f"{n}, trained on" if n in trained else n for n in summary["accuracy"]["after"]]
    for name, row in zip(summary["accuracy"]["after"], rows, strict=True):
        change = 100 * (summary["accuracy"]["after"][name] - summary["accuracy"]["before"][name])
        assert float(row[3].partition(" ")[0]) == pytest.approx(change, abs=0.051)
    assert "Not trained on in these stages, so carried over if it rose: table" in text


def test_a_change_is_over_the_same_questions_and_named_by_its_interval(copy: Path) -> None:
    for label, right in (("warm-up", {"graph"}), ("words", {"natural"})):
        file = copy / "completions" / f"exam-{label}.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        for row in rows:
            row["correct"] = row["representation"] in right
            if row["representation"] == "code" and label == "words":
                row["prompt"] = "another question"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = {one.name: one for one in changes(read_run(copy))}
    assert {name: one.verdict for name, one in found.items()} == {
        "natural": "rose", "graph": "fell", "code": "not compared", "table": "no change shown",
    }  # fmt: skip
    assert found["natural"].difference == (1.0, 1.0, 1.0) and found["table"].difference == (0.0, 0.0, 0.0)


def test_several_runs_are_answered_by_condition_and_by_run(compared: Path) -> None:
    text = compared.read_text()
    assert text.index("Did they learn") < text.index("<figure>")
    label = "sft graph+natural → graph → code+natural"
    assert f"A, {label}, 1 run: natural" in text and f"B, {label} (run-2), 2 runs: natural" in text
    head, *rows = Page(text).table("run")
    assert [row[0] for row in rows] == [f"{i}  run-{i}" for i in range(1, 4)]
    assert head[1:] == ["recipe", "seed", "natural", "graph", "code", "table"]
    assert [row[1:3] for row in rows] == [["A", "1"], ["B", "2"], ["B", "3"]]
    assert text.count('<details class="run">') == 3 and "run-1, run-2, run-3" in text


def test_thousands_of_steps_are_drawn_as_means_and_a_band(finished_run: Path, tmp_path: Path) -> None:
    steps, values = np.arange(5000.0), np.sin(np.arange(5000.0))
    values[:20] = np.nan  # the first part has no value
    middle, mean, low, high = thinned(steps, values)
    assert len(middle) == MAX_POINTS and np.isnan(mean[0]) and np.isfinite(mean[1:]).all()
    np.testing.assert_allclose(low[1:], values[20:].reshape(-1, 20).min(axis=1), rtol=0)
    np.testing.assert_allclose(high[1:], values[20:].reshape(-1, 20).max(axis=1), rtol=0)
    np.testing.assert_allclose(mean[1:], values[20:].reshape(-1, 20).mean(axis=1), rtol=1e-12)
    page = write_report([long_run(finished_run, tmp_path / "long", steps=5000)], tmp_path / "out")
    assert page.stat().st_size < 1_500_000
    assert f"Lines are means over {MAX_POINTS} equal parts" in page.read_text()


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium as the command chromium")
def test_nothing_runs_off_a_narrow_screen(page: Path, compared: Path, tmp_path: Path) -> None:
    simulated_study.write_study(tmp_path / "study", {"words": 0.0, "graph20_words": 0.05}, num_items=40)
    pages = [page, compared, write_study(tmp_path / "study")]
    frames = "".join(
        f'<iframe style="width:{width}px;height:800px" srcdoc="{html.escape(one.read_text())}"></iframe>'
        for one in pages
        for width in WIDTHS
    )
    script = (
        "onload = () => { document.title = [...document.querySelectorAll('iframe')].map(f => {"
        "const root = f.contentDocument.documentElement;"
        "const broken = [...f.contentDocument.images].filter(i => i.offsetParent && !i.naturalWidth).length;"
        "return root.scrollWidth - root.clientWidth + ' ' + broken }).join(',') }"
    )
    frame = tmp_path / "frame.html"
    frame.write_text(
        f"<!DOCTYPE html><meta charset=utf-8><title></title><body>{frames}<script>{script}</script></body>"
    )
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'browser'}"]
    command = ["chromium", *options, "--virtual-time-budget=10000", "--dump-dom", frame.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.findall("<title>(.*?)</title>", done.stdout)[0].split(",")
    assert found == ["0 0"] * (len(pages) * len(WIDTHS))  # pixels that overflow, pictures that are not drawn


def test_the_accuracies_are_those_of_the_summary(page: Path, finished_run: Path) -> None:
    summary = summary_of(finished_run)
    head, *rows = Page(page.read_text()).table("representation")
    assert head[1:3] == ["before (warm-up)", "after (words)"]
    assert [row[0] for row in rows] == ["natural", "graph", "code", "table"]
    for name, before, after, change, baseline, shortcut, no_answer, questions in rows:
        for shown, when in ((before, "before"), (after, "after")):
            known = summary["intervals"][when][name]
            assert shown == f"{known['rate']:.1%} [{known['low']:.1%}, {known['high']:.1%}]"
        difference = summary["accuracy"]["after"][name] - summary["accuracy"]["before"][name]
        assert change == f"{100 * difference:+.1f}"
        assert baseline == f"{summary['floor'][name]:.1%}" and questions == "16"
        assert shortcut == f"{max(summary['shortcuts'][name].values()):.1%}"
        assert no_answer == f"{summary['no_answer']['after'][name]:.1%}"


def test_the_times_per_phase_add_up(page: Path, finished_run: Path) -> None:
    _, *rows = Page(page.read_text()).table("stage")
    assert [row[1] for row in rows] == [*map(figures.phase_name, figures.PHASES), "step"] * 3
    assert not {"ask", "judge", "handover", "rest"} & {row[1] for row in rows}  # keys of files, not words
    size = len(figures.PHASES) + 1
    symbols = {row[1]: row for row in rows[size : 2 * size]}
    assert rows[size][0] == "symbols (2 steps)"
    shares = [float(row[3].rstrip("%")) for name, row in symbols.items() if name != "step"]
    assert sum(shares) == pytest.approx(100, abs=0.051 * size)  # each is rounded by at most 0.05
    raw = steps_of(finished_run, "symbols")
    tokens, seconds = (sum(row[key] for row in raw) for key in ("tok/response", "time/generate_s"))
    assert symbols["generate"][2] == f"{seconds:.2f}"
    assert symbols["generate"][5] == f"{tokens / seconds:,.0f}"
    assert rows[0][5] == "-"  # demonstrations are not generated


def test_hardly_anything_of_a_step_is_without_a_name(finished_run: Path) -> None:
    rows = read_run(finished_run).rows
    seconds = figures.phase_seconds(rows)
    between = sum(v for row in rows for k, v in row.items() if k.startswith("time/between/"))
    total = sum(row["time/between_s"] for row in rows)
    assert between <= total
    whole = total + sum(row["time/step_s"] for row in rows)
    assert seconds["rest"].sum() + total - between < 0.02 * whole
    assert whole == pytest.approx(rows[-1]["wall_s"], rel=0.02)


def test_phases_and_rest_make_the_step(finished_run: Path) -> None:
    rows = read_run(finished_run).rows
    total = sum(figures.phase_seconds(rows).values())
    np.testing.assert_allclose(total, [row["time/step_s"] for row in rows], rtol=1e-12)


def test_stages_and_samples_are_shown(page: Path, finished_run: Path) -> None:
    text = page.read_text()
    assert "warm-up: 80 steps of sft; symbols: 2 steps of grpo; words: 1 steps of dapo" in text
    sample = json.loads((finished_run / "completions" / "exam-words.jsonl").read_text().splitlines()[0])
    assert html.escape(sample["text"]) in text
    assert "natural, reward 1" in text and "natural, reward 0" in text


def test_responses_without_an_answer_are_counted_apart(copy: Path, tmp_path: Path) -> None:
    file = copy / "completions" / "exam-words.jsonl"
    answers = [json.loads(line) for line in file.read_text().splitlines()]
    missing = summary_of(copy)["no_answer"]["after"]
    for name in missing:
        found = [answer_found("async_plan", row["text"]) for row in answers if row["representation"] == name]
        assert missing[name] == found.count(False) / len(found)
    for row in answers:
        row["answered"] = row["representation"] != "graph"
    file.write_text("".join(json.dumps(row) + "\n" for row in answers))
    head, *rows = Page(text := write_report([copy], tmp_path / "out").read_text()).table("representation")
    assert {row[0]: row[head.index("no answer")] for row in rows} == {
        "natural": "0.0%", "graph": "100.0%", "code": "0.0%", "table": "0.0%",
    }  # fmt: skip
    assert "no answer found" in text
    assert all(0 <= row["judge/no_answer"] <= 1 for row in steps_of(copy, "words") + steps_of(copy, "warm-up"))


def test_one_run_shows_what_carried_over(page: Path) -> None:
    head, *rows = Page(page.read_text()).table("trained on \\ evaluated on")
    assert head[1:] == ["natural", "graph", "code", "table"]
    assert [row[0] for row in rows] == [
        "sft graph+natural",
        "sft graph+natural → graph",
        "sft graph+natural → graph → code+natural",
    ]


def test_an_unfinished_run_is_reported_as_far_as_it_came(copy: Path, tmp_path: Path) -> None:
    known = summary_of(copy)
    (copy / "summary.json").unlink()
    (copy / "completions" / "exam-words.jsonl").unlink()
    lines = (copy / "steps.jsonl").read_text().splitlines()
    (copy / "steps.jsonl").write_text("\n".join([*lines[:-1], lines[-1][:40]]))
    page = Page(text := write_report([copy], tmp_path / "out").read_text())
    assert "This run is unfinished: step 82 of at most 83, in stage symbols" in text
    assert "1 row(s) from line 83 on cannot be read" in text
    head, *rows = page.table("representation")
    assert head[2] == "so far (symbols)"
    for row in rows:  # the sequential baseline and the shortcuts, from the checkpoint
        best = max(known["shortcuts"][row[0]].values())
        assert row[4:6] == [f"{known['floor'][row[0]]:.1%}", f"{best:.1%}"]


def test_a_run_without_an_evaluation_or_an_rl_stage_is_reported(copy: Path, tmp_path: Path) -> None:
    shutil.rmtree(copy / "completions")
    shutil.rmtree(copy / "checkpoints")
    (copy / "summary.json").unlink()
    (copy / "steps.jsonl").write_text((copy / "steps.jsonl").read_text().splitlines()[0] + "\n")
    text = write_report([copy], tmp_path / "out").read_text()
    assert "There has been no evaluation yet" in text and "There are no files in completions/ yet" in text
    assert {file.stem for file in (tmp_path / "out").glob("*.png")} == {"reward", "health", "phases"}


def test_a_half_written_evaluation_is_named_and_left_out(copy: Path) -> None:
    file = copy / "completions" / "exam-words.jsonl"
    file.write_text(file.read_text()[:-20])
    record = read_run(copy)
    assert record.notes == ("completions/exam-words.jsonl is incomplete and left out",)
    assert [done.label for done in record.evaluations] == ["warm-up", "symbols"]


def test_seeds_are_pooled_and_other_conditions_are_not(finished_run: Path, tmp_path: Path) -> None:
    runs = [finished_run]
    for name, change in (("seed", {"run": {"seed": 7}}), ("slower", {"eval": {"max_new_tok": 47}})):
        other = Path(shutil.copytree(finished_run, tmp_path / name))
        described = json.loads((other / "run.json").read_text())
        for table, values in change.items():
            described["recipe"][table].update(values)
        (other / "run.json").write_text(json.dumps(described))
        runs.append(other)
    page = Page(write_report(runs, tmp_path / "out").read_text())
    head, *rows = page.table("trained on \\ evaluated on")
    label = "sft graph+natural → graph → code+natural"
    assert [row[0] for row in rows] == [label, f"{label} (slower)"]
    known = summary_of(finished_run)["intervals"]["after"]["natural"]
    assert rows[0][1].split(" ")[0] == rows[1][1].split(" ")[0] == f"{known['rate']:.1%}"
    assert rows[1][1] == f"{known['rate']:.1%} [{known['low']:.1%}, {known['high']:.1%}]"
    assert rows[0][1] != rows[1][1]  # twice the questions, a narrower interval
    pictures = {file.stem for file in (tmp_path / "out").glob("*.png")}
    assert {"transfer", "compare-reward", "compare-accuracy", "1-reward", "2-reward", "3-phases"} <= pictures


def test_nothing_that_was_written_becomes_html(copy: Path, tmp_path: Path) -> None:
    row = {"representation": "natural", "text": "<script>alert(1)</script>", "reward": 1.0, "prompt": "<b>who?</b>"}
    (copy / "completions" / "step-00000099.jsonl").write_text(json.dumps(row) + "\n")
    (copy / "summary.json").write_text(json.dumps({"status": "failed", "reason": "drift of 3 > 2 nats"}))
    text = write_report([copy], tmp_path / "out").read_text()
    assert "This run is failed (drift of 3 &gt; 2 nats)" in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text and "&lt;b&gt;who?&lt;/b&gt;" in text
    assert "<script" not in text and "<b>" not in text


def test_names_cannot_leave_a_drawing() -> None:
    figure = new_figure(1.0)
    figure.suptitle(as_label("</text><script>alert(1)</script>\x1b[2J $\\frac$"))
    drawing = themed_svg(figure)
    assert "<script" not in drawing and "&lt;script&gt;" in drawing
    ElementTree.fromstring(drawing)  # a control character would not be XML


def test_a_representation_has_one_colour_everywhere(finished_run: Path) -> None:
    record = read_run(finished_run)
    lines = [line for ax in figures.learning(record).axes for line in ax.lines]
    named = {str(line.get_label()): to_hex(line.get_color()) for line in lines if line.get_label() in figures.COLOUR_OF}
    assert named == {name: figures.COLOUR_OF[name].lower() for name in ("graph", "natural", "code")}
    bars = figures.evaluation_accuracy(record).axes[0].containers
    shown = {str(bar.get_label()): to_hex(bar.lines[0].get_color()) for bar in bars}
    assert shown == {name: colour.lower() for name, colour in figures.COLOUR_OF.items()}
    assert figures.colours(["natural", "poem", "song"])["poem"] != figures.colours(["natural", "poem", "song"])["song"]


@pytest.mark.parametrize("change", [lambda reward: 3 * reward, lambda reward: reward - 1.5, lambda reward: reward])
def test_rewards_beyond_0_and_1_are_in_the_picture(change: Any, finished_run: Path) -> None:
    record = read_run(finished_run)

    def changed(row: dict[str, Any]) -> dict[str, Any]:
        return {k: change(v) if k.startswith("reward/") and isinstance(v, float) else v for k, v in row.items()}

    spans = tuple(dataclasses.replace(span, rows=tuple(map(changed, span.rows))) for span in record.spans)
    record = dataclasses.replace(record, spans=spans)
    for ax in (figures.learning(record).axes[-1], figures.compare_rewards([record], ["one"]).axes[0]):
        drawn = np.concatenate([np.asarray(line.get_ydata(), float) for line in ax.lines if len(line.get_xdata()) != 2])
        low, high = ax.get_ylim()
        assert low <= min(0.0, np.nanmin(drawn)) and high >= max(1.0, np.nanmax(drawn))


def test_boundaries_between_stages_are_marked(finished_run: Path) -> None:
    ax = figures.phase_times(read_run(finished_run)).axes[0]
    marks = sorted(x for line in ax.lines for x in {float(x) for x in np.asarray(line.get_xdata())})
    assert marks == [80.5, 82.5]
    assert [text.get_text() for text in ax.texts] == ["warm-up", "symbols", "words"]


def test_the_moving_average_passes_over_gaps() -> None:
    nan = float("nan")
    got = moving_average(np.array([nan, 1.0, nan, 3.0, nan, nan]), 2)
    np.testing.assert_array_equal(got, [nan, 1.0, 1.0, 3.0, 3.0, nan])


def test_what_was_trained_on_is_told_by_data_not_by_names(finished_run: Path) -> None:
    stages = read_run(finished_run).recipe.stage
    assert trained_on([]) == "nothing"
    assert trained_on(stages[1:2]) == "graph"


def broken(record: RunRecord, file: str, text: str) -> str:
    (record.folder / file).write_text(text)
    with pytest.raises(UserError) as caught:
        write_report([record.folder], record.folder / "report")
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        ("run.json", "{", "must be the folder of a run"),
        ("run.json", "{}", "must hold the run's recipe"),
        ("run.json", '{"recipe": {"model": {}}}', "must be given"),
        ("steps.jsonl", "", "holds no completed step yet"),
        ("steps.jsonl", "7\n", "line 1: must be one step's row"),
        ("steps.jsonl", '{"step": 1, "stage": "poems", "time/step_s": 1}\n', "'poems' is not in the recipe"),
        ("summary.json", "[]", "must be the summary of a run"),
    ],
)
def test_a_broken_run_folder_is_refused_by_name(file: str, text: str, expected: str, copy: Path) -> None:
    assert expected in broken(read_run(copy), file, text)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="must be the folder of a run"):
        write_report([tmp_path], tmp_path / "out")
    with pytest.raises(UserError, match="at least one run"):
        write_report([], tmp_path / "out")


def test_an_out_that_is_a_file_is_refused(finished_run: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        write_report([finished_run], tmp_path / "file")


def test_the_command_ends_with_2_and_one_line(tmp_path: Path, warm_isomorph: list[str]) -> None:
    command = [*warm_isomorph, "report", "nowhere"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: nowhere must be the folder of a run") and done.stderr.count("\n") == 1
