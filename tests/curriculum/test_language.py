"""Rich language states exactly the procedure: every question is read back, sentence by sentence."""

import ast
import random
import re
import subprocess
import sys

import pytest

from isomorph.curriculum.judge import judge
from isomorph.curriculum.tasks import frames
from isomorph.curriculum.tasks.async_plan import Difficulty, draw, draw_tasks, render, solve
from isomorph.curriculum.tasks.domains import DOMAINS
from isomorph.curriculum.tasks.procedure import Procedure

RICH = Difficulty(
    language="rich", min_steps=4, max_steps=7, max_predecessors=3, units=("min", "hour", "day"), shuffled=True
)
_ONE = r'(?:the task "[^"]+"|step \d+)'
_GROUPS = {
    "a": rf"(?P<a>{_ONE})",
    "b": rf"(?P<b>{_ONE})",
    "many": r"(?P<many>steps \d+ and \d+)",
    "n": r"(?P<n>\d+)",
    "time": r"(?P<time>\d+ \w+)",
    "spelled": r"(?P<spelled>\d+ \w+)",
    "act": r"(?P<act>[^\n\"]+?)",
    "goal": r"(?P<goal>.+)",
    "name": r"\w+",
    "place": r"\w+",
    "number": r"\d+",
}
SECONDS = {"minute": 60, "min": 60, "hour": 3600, "day": 86400}


def _pattern(frame: str) -> str:
    parts = re.split(r"\{(\w+)\}", frame)
    text = "".join(_GROUPS[part] if i % 2 else re.escape(part) for i, part in enumerate(parts))
    return f"(?i:{text})"


def _seconds(text: str) -> int:
    number, unit = text.split()
    return int(number) * SECONDS[unit.removesuffix("s")]


def _read(text: str) -> tuple[dict[int, int], set[tuple[int, int]]]:
    """Durations and edges, by the frames; every sentence between the list and the question must be of a known one."""
    first, order, _ = text.split("\n\n")
    steps = first.split("\n")[1:]
    found: list[re.Match[str]] = []
    for line in steps:
        matches = [m for frame in frames.STEPS if (m := re.fullmatch(_pattern(frame), line))]
        assert matches, line
        found.append(matches[0])
    times = {int(m["n"]): _seconds(m.groupdict().get("time") or m["spelled"]) for m in found}
    names = {m["act"].lower(): int(m["n"]) for m in found}

    def number(reference: str) -> int:
        task = re.fullmatch(r'(?i:the task "(.+)")', reference)
        return names[task[1].lower()] if task else int(reference.split()[1])

    edges: set[tuple[int, int]] = set()
    rest = order.partition("\n")[2]
    kinds = [(frame, "edge") for frame in frames.EDGES] + [(frame, "none") for frame in frames.DISTRACTORS]
    kinds += [(f, "many") for f in (*frames.FANS_OUT, *frames.FANS_IN)]
    while rest := rest.strip():
        options = [(m, kind) for frame, kind in kinds if (m := re.match(_pattern(frame), rest))]
        assert options, rest
        match, kind = max(options, key=lambda option: option[0].end())
        rest = rest[match.end() :]
        if kind == "edge":
            edges.add((number(match["a"]), number(match["b"])))
        elif kind == "many":
            several = map(int, re.findall(r"\d+", match["many"]))
            known = match.groupdict()
            edges |= {(number(known["a"]), k) if known.get("a") else (k, number(known["b"])) for k in several}
    return times, edges


def _expected(procedure: Procedure) -> tuple[dict[int, int], set[tuple[int, int]]]:
    times = {j + 1: d.seconds for j, d in enumerate(procedure.durations)}
    return times, {(i + 1, j + 1) for j, before in enumerate(procedure.predecessors) for i in before}


@pytest.mark.parametrize("is_kept", [False, True])
def test_a_question_in_rich_language_is_read_back_to_its_procedure(is_kept: bool) -> None:
    for i in range(120):
        procedure = draw(random.Random(f"rich:{i}"), RICH, split="train")
        text = render(procedure, "natural", random.Random(i), RICH, is_kept=is_kept)
        assert _read(text) == _expected(procedure), text


def test_the_second_forms_of_graphs_and_programs_say_the_same() -> None:
    forms: dict[str, set[bool]] = {"graph": set(), "code": set()}
    ran = 0
    for i in range(30):
        procedure = draw(random.Random(i), RICH, split="train")
        times, edges = _expected(procedure)
        text = render(procedure, "graph", random.Random(i), RICH)
        forms["graph"].add("edges of the graph" in text)
        if "edges of the graph" in text:
            assert set(ast.literal_eval(re.findall(r"^\[.*\]$", text, re.M)[0])) == edges
            assert {int(n): _seconds(t) for n, t in re.findall(r"node (\d+): (\d+ \w+)", text)} == times
        text = render(procedure, "code", random.Random(i), RICH)
        forms["code"].add("needs = " in text)
        if "needs = " in text and ran < 4:
            program = text.split("```python\n")[1].split("\n```")[0]
            printed = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True, check=True)
            assert judge("async_plan", f"<answer>{printed.stdout}</answer>", solve(procedure)[0]) == 1.0
            ran += 1
    assert forms == {"graph": {False, True}, "code": {False, True}} and ran == 4


def test_there_are_forty_frames_a_kind_and_those_of_the_test_exam_are_its_own() -> None:
    kinds = (frames.INTROS, frames.STEPS, frames.EDGES, frames.QUESTIONS)
    assert all(len(set(kind)) == len(kind) >= 40 for kind in kinds)
    asked = {
        split: [task.question for task in draw_tasks(RICH, "natural", 80, seed=0, split=split)]
        for split in ("train", "dev", "test")
    }
    kept = frames.QUESTIONS[-frames.KEPT :]
    counts = {split: sum(any(q in text for q in kept) for text in texts) for split, texts in asked.items()}
    assert counts["train"] == counts["dev"] == 0 and 20 <= counts["test"] <= 60


def test_the_words_are_thousands_over_many_domains() -> None:
    texts = [task.question for task in draw_tasks(RICH, "natural", 2500, seed=1, split="train")]
    words = {word.lower() for text in texts for word in re.findall(r"[A-Za-z'-]+", text)}
    assert len(words) >= 2000
    assert len(DOMAINS) >= 40 and all(len(domain.things) >= 20 for domain in DOMAINS)
