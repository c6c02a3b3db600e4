"""A run's answers in the terminal."""

import io
import json
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from isomorph.curriculum.commands.show import show_responses
from isomorph.engine.config import UserError


def shown(run: Path, step: int | None = None, num: int = 3) -> str:
    out = io.StringIO()
    show_responses(run, step, num, Console(file=out, width=100))
    return out.getvalue()


def write(run: Path, name: str, rewards: list[float]) -> None:
    facts = {"prompt_id": 7, "representation": "graph", "prompt": "a [b] :stir:", "text": "<answer>[5]</answer>"}
    rows = [{**facts, "reward": reward, "advantage": reward - 0.5, "finish": "length"} for reward in rewards]
    (run / "completions" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "completions").mkdir()
    (tmp_path / "run.json").write_text('{"recipe": {}}')
    write(tmp_path, "step-00000010", [0.0, 0.0, 0.0, 0.0, 1.0])
    return tmp_path


def test_a_right_and_a_wrong_answer_stand_beside_each_other_as_they_are(run: Path) -> None:
    text = shown(run, num=2)
    assert "step-00000010" in text and "graph: 5 responses, 20% right" in text
    assert text.count("reward 1, advantage +0.50") == 1 and text.count("reward 0, advantage -0.50") == 1
    assert "a [b] :stir:" in text and "<answer>[5]</answer>" in text and "cut off at max_new_tok" in text


def test_no_answer_obeys_the_terminal_and_a_missing_one_is_told(run: Path) -> None:
    text = "\x1b[2J\x1b]0;owned\x07 \x9b31m \u202eno tags"
    row = {"prompt_id": 7, "representation": "[red]gr\x1baph", "prompt": "a\rb", "text": text, "reward": 0.0}
    (run / "completions" / "exam-words.jsonl").write_text(json.dumps({**row, "answered": False}) + "\n")
    out = shown(run)
    assert not set(out) & set("\x1b\x07\x9b\u202e\r")
    assert "\\x1b[2J\\x1b]0;owned\\x07" in out and "a\\rb" in out and "[red]gr\\x1baph" in out
    assert "100% without an answer" in out and "no answer found" in out


def test_the_newest_answers_are_shown_or_those_of_a_step(run: Path) -> None:
    write(run, "exam-words", [1.0])
    assert "exam-words" in shown(run)
    assert "step-00000010" in shown(run, step=10)


def test_a_response_that_no_reward_applies_to_is_shown(run: Path) -> None:
    row = {"prompt_id": 7, "representation": "graph", "prompt": "a", "text": "b", "reward": None, "advantage": None}
    (run / "completions" / "exam-words.jsonl").write_text(json.dumps({**row, "correct": False}) + "\n")
    assert "no reward applies" in shown(run)


def test_what_is_not_there_is_told(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no responses of step 3, only of 10"):
        shown(run, step=3)
    shutil.rmtree(run / "completions")
    with pytest.raises(UserError, match="no responses yet"):
        shown(run)
    with pytest.raises(UserError, match="must be the folder of a run"):
        shown(tmp_path / "nowhere")


def test_a_real_runs_answers_are_shown(finished_run: Path) -> None:
    assert all(name in shown(finished_run, num=1) for name in ("natural", "graph", "code", "table"))


def test_partial_credit_is_shown_among_the_wrong_answers(run: Path) -> None:
    file = run / "completions" / "step-00000010.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[0] |= {"reward": 0.5, "correct": False}
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "graph: 5 responses, 20% right" in shown(run)
