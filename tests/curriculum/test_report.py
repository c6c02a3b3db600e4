"""The report page: its parts, its figures, runs that are not finished, and folders that are no runs."""

import base64
import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_hex
from tiny_runs import summary_of

from isomorph.curriculum.report import figures
from isomorph.curriculum.report.drawing import moving_average
from isomorph.curriculum.report.page import write_report
from isomorph.curriculum.report.run_record import RunRecord, read_run, trained_on
from isomorph.curriculum.rewards.pool import answer_found
from isomorph.engine.config import UserError

PNG = b"\x89PNG\r\n\x1a\n"
PICTURES = ("evaluations", "transfer", "reward", "health", "phases")


class Page(HTMLParser):
    """Collects tables and sources, and checks that every element is closed in order."""

    VOID = ("meta", "img", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]
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
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data

    def table(self, corner: str) -> list[list[str]]:
        return next(table for table in self.tables if table[0][0] == corner)


@pytest.fixture(scope="module")
def page(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report([finished_run], tmp_path_factory.mktemp("report"))


@pytest.fixture
def copy(finished_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished_run, tmp_path / "copy"))


def steps_of(run: Path, name: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "steps.jsonl").read_text().splitlines()]
    return [row for row in rows if row["stage"] == name]


def test_the_page_stands_alone(page: Path) -> None:
    text = page.read_text()
    sources = Page(text).sources
    assert len(sources) == len(PICTURES)
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert not re.search(r"https?:|//[a-z]|<script|<link|@import|url\(", text.split("base64,")[0], re.IGNORECASE)
    assert "<script" not in text and "http" not in re.sub(r"base64,[^\"]*", "", text)


def test_every_picture_is_in_the_page_and_beside_it(page: Path) -> None:
    embedded = {base64.b64decode(source.partition(",")[2]) for source in Page(page.read_text()).sources}
    files = {file.stem: file.read_bytes() for file in page.parent.glob("*.png")}
    assert set(files) == set(PICTURES)
    assert all(data.startswith(PNG) for data in files.values())
    assert embedded == set(files.values())


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
        assert change == f"{100 * difference:+.1f} points"
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


def test_a_representation_has_one_colour_everywhere(finished_run: Path) -> None:
    record = read_run(finished_run)
    lines = [line for ax in figures.learning(record).axes for line in ax.lines]
    named = {str(line.get_label()): to_hex(line.get_color()) for line in lines if line.get_label() in figures.COLOUR_OF}
    assert named == {name: figures.COLOUR_OF[name].lower() for name in ("graph", "natural", "code")}
    bars = figures.evaluation_accuracy(record).axes[0].containers
    shown = {str(bar.get_label()): to_hex(bar.lines[0].get_color()) for bar in bars}
    assert shown == {name: colour.lower() for name, colour in figures.COLOUR_OF.items()}
    assert figures.colours(["natural", "poem", "song"])["poem"] != figures.colours(["natural", "poem", "song"])["song"]


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
