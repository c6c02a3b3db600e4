"""Tasks travel as JSON."""

import json

import pytest

from isomorph.curriculum.tasks.task import DataError, Task

TASK = Task(
    family="async_plan",
    representation="graph",
    question="graph = {1: []} minutes = {1: 5} time? ½ \n",
    answer="5 min",
    key="00ff",
    demonstration=None,
    sequential_answer="5 min",
    difficulty={"units": ["min"], "max_steps": 5},
    data="plans",
    row={"question": "½", "extra": {"n": [1, None]}},
    messages=({"role": "user", "content": "½"},),
)


def test_json_gives_back_an_equal_task() -> None:
    text = TASK.to_json()
    assert "\n" not in text
    assert Task.from_json(text) == TASK


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("{", "JSON"),
        ("[" * 100_000, "JSON"),
        ("[]", "list"),
        ('{"family": "math"}', "missing"),
        (json.dumps({**json.loads(TASK.to_json()), "extra": 1}), "extra"),
        (json.dumps({**json.loads(TASK.to_json()), "answer": None}), "answer"),
        (json.dumps({**json.loads(TASK.to_json()), "key": 7}), "key"),
        (json.dumps({**json.loads(TASK.to_json()), "row": []}), "row"),
        (json.dumps({**json.loads(TASK.to_json()), "messages": "hi"}), "messages"),
    ],
)
def test_what_is_not_a_task_is_refused_by_name(text: str, named: str) -> None:
    with pytest.raises(DataError, match=named):
        Task.from_json(text)
