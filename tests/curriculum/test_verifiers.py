"""Environments of the package verifiers: their rows, their turns, the reward of their rubric; the real package."""

import asyncio
import io
import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from rich.console import Console

from isomorph.curriculum.assemble import run_recipe
from isomorph.curriculum.environments import verifiers_form
from isomorph.curriculum.environments.calls import CallFormat
from isomorph.curriculum.environments.done import Done
from isomorph.curriculum.environments.worker import EnvironmentSpec, close, describe, reset, step
from isomorph.curriculum.recipe import Recipe
from isomorph.curriculum.rewards.worker import DeadlineAlarm
from isomorph.curriculum.rows.spec import RowsData
from isomorph.engine.distributed.ranks import ALONE
from isomorph.engine.recipe_file import load_recipe
from isomorph.engine.record.runlog import read_steps

vf = pytest.importorskip("verifiers", reason="needs the extra [verifiers]")
FILE = Path(__file__).parent / "verifiers_of_users.py"
PLACE = f"verifiers:{FILE}"
JSON = CallFormat(is_json=True, opening="<tool_call>")


def load(shape: str, *, limit: int | None = None, **options: Any) -> Any:
    return verifiers_form.loaded(PLACE, {"shape": shape, **options}, limit)


def row_of(environment: Any, index: int = 0) -> dict[str, Any]:
    return dict(environment.build_dataset()[index])


def by_hand(environment: Any, row: dict[str, Any], said: list[dict[str, str]], **facts: Any) -> float:
    """What the package's rubric gives for a conversation that is written down here."""
    timing = {"scoring_ms": 0.0, "total_ms": 0.0}
    state = vf.State(input=row, completion=said, trajectory=[], timing=timing, reward=None, metrics=None, **facts)
    asyncio.run(environment.rubric.score_rollout(state))
    return float(state["reward"])


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def model(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def test_a_single_turn_environment_gives_its_rubrics_reward() -> None:
    environment = load("single")
    row = row_of(environment, 2)
    talk = verifiers_form.Conversation(environment, CallFormat())
    assert talk.reset(row) == [{"role": "system", "content": "Be brief."}, user("Count to 3.")]
    reward = by_hand(environment, row, [model("1 2 3")])
    assert reward == 0.05 + 0.5
    assert talk.step("1 2 3") == Done(reward)


def test_a_multi_turn_environment_goes_on_until_it_ends_by_itself() -> None:
    environment = load("count")
    row = row_of(environment, 1)
    talk = verifiers_form.Conversation(environment, CallFormat())
    assert talk.reset(row) == [user("Count to 2.")]
    assert talk.step("1") == [user("Say 2.")]
    assert talk.step("seven") == [user("Say 2.")]
    said = [model("1"), user("Say 2."), model("seven"), user("Say 2."), model("2"), user("Done.")]
    assert talk.step("2") == Done(by_hand(environment, row, said, next=3, wrong=1))


def test_our_limit_of_turns_ends_it_as_its_own_does() -> None:
    environment = load("count", limit=2)
    row = row_of(environment, 4)
    talk = verifiers_form.Conversation(environment, CallFormat())
    talk.reset(row)
    assert talk.step("1") == [user("Say 2.")]
    said = [model("1"), user("Say 2."), model("2 ")]
    assert talk.step("2 ") == Done(by_hand(environment, row, said, next=2, wrong=0))
    assert load("count", limit=9, max_turns=3).max_turns == 3


@pytest.mark.parametrize("format", [JSON, CallFormat()])
def test_tools_are_called_by_the_package(format: CallFormat) -> None:
    environment = load("tools")
    row = row_of(environment)
    talk = verifiers_form.Conversation(environment, format)
    assert talk.reset(row) == [user("Count to 1.")]
    right = {"name": "look", "arguments": {"key": 3, "unit": "m"}}
    calls = {
        True: f"Well. <tool_call> {json.dumps(right)} </tool_call> <tool_call> {{oops }} </tool_call>",
        False: "Well. <call> look 3 m </call> <call> look x m </call>",
    }
    first, second = talk.step(calls[format.is_json])
    assert first == {"role": "tool", "name": "look", "content": "33 m"}
    assert second["role"] == "tool" and "content" in second  # the package's own words on what it cannot read
    assert talk.step("It is 1.") == Done(by_hand(environment, row, [model("It is 1.")], **{}))
    spec = EnvironmentSpec(PLACE, (), {"shape": "tools"}, 60.0, JSON)
    told = describe(spec)
    assert told.has_tools and told.has_step and [s["function"]["name"] for s in told.schemas] == ["look"]


def test_a_group_of_environments_goes_by_the_rows_task() -> None:
    environment = load("mixed")
    rows = [dict(row) for row in environment.build_dataset()]
    one, many = (next(row for row in rows if row["task"] == name and row["answer"] == "2") for name in ("one", "many"))
    talk = verifiers_form.Conversation(environment, CallFormat())
    assert talk.reset(one)[0]["role"] == "system"
    assert talk.step("2") == Done(by_hand(environment, one, [model("2")])) == Done(0.01 + 0.5)
    talk = verifiers_form.Conversation(environment, CallFormat())
    assert talk.reset(many) == [user("Count to 2.")] and talk.step("1") == [user("Say 2.")]


def test_a_tool_may_get_arguments_that_the_model_does_not_see() -> None:
    environment = load("stateful")
    talk = verifiers_form.Conversation(environment, JSON)
    assert "unit" not in json.dumps(talk.tools)
    talk.reset(row_of(environment, 3))
    call = json.dumps({"name": "look", "arguments": {"key": 2}})
    (said,) = talk.step(f"<tool_call> {call} </tool_call>")
    assert said == {"role": "tool", "name": "look", "content": "22 of 4"}


def test_an_empty_turn_is_the_models_fault_and_is_scored() -> None:
    talk = verifiers_form.Conversation(load("single"), CallFormat())
    talk.reset(row_of(load("single")))
    assert talk.step("") == Done(0.0)


@pytest.mark.parametrize(
    ("shape", "text", "sentence"),
    [
        ("count", "raise", r"KeyError: 'a broken environment' \(.*verifiers_of_users.py:\d+\)"),
        ("count", "tool error", r"ValueError: no such tool"),
        ("forgetful", "1", r"ValueError: the environment rewrites earlier messages"),
    ],
)
def test_what_an_environment_does_wrong_is_named(shape: str, text: str, sentence: str) -> None:
    spec = EnvironmentSpec(PLACE, (), {"shape": shape}, 60.0, CallFormat())
    first = (user("Count to 1."),)
    row = {**row_of(load(shape)), "answer": "9"}
    outcome = step(spec, 5, row, 0, first, (text,), False, True)
    assert outcome.failed, outcome
    assert re.match(sentence, outcome.failed), outcome.failed


def test_a_hanging_environment_is_interrupted_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def raise_deadline(number: int, frame: Any) -> None:
        raise DeadlineAlarm

    environment = load("count")
    spec = EnvironmentSpec(PLACE, (), {"shape": "count"}, 0.2, CallFormat())
    row, first = row_of(environment, 3), (user("Count to 4."),)
    asleep = type(environment).env_response

    async def hanging(self: Any, messages: Any, state: Any, **kwargs: Any) -> Any:
        if messages[-1]["content"] == "hang":
            await asyncio.sleep(1000)
        while messages[-1]["content"] == "spin":
            pass
        return await asleep(self, messages, state, **kwargs)

    monkeypatch.setattr(type(environment), "env_response", hanging)
    before = signal.signal(signal.SIGALRM, raise_deadline)
    try:
        assert step(spec, 1, row, 0, first, ("1",), False, True).messages == (user("Say 2."),)
        for key, text in ((2, "hang"), (3, "spin")):
            outcome = step(spec, key, row, 0, first, (text,), False, True)
            assert outcome.is_late and outcome.failed.startswith("not over after 0.2 s"), outcome
        assert step(spec, 1, row, 0, first, ("1", "2"), False, False).messages == (user("Say 3."),)
        cleaned = asleep.__globals__["CLEANED"]
        num = len(cleaned)
        close(1)
        assert cleaned[num:] == ["4"]  # the package's own clean-up
        assert reset(spec, row, 0).messages == first and cleaned[num:] == ["4", "4"]
    finally:
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize(
    ("place", "shape", "sentence"),
    [
        (PLACE, "group", "reward functions of a whole group are not supported: of_the_group"),
        ("verifiers:no-such-environment", "x", "Could not import 'no-such-environment' environment"),
        ("verifiers:/nowhere/x.py", "x", "there is no such file"),
    ],
)
def test_an_environment_that_cannot_be_driven_is_refused(place: str, shape: str, sentence: str) -> None:
    found = describe(EnvironmentSpec(place, (), {"shape": shape}, 60.0, CallFormat()))
    assert sentence in found.failed


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"path": None}, "path must be given"),
        ({"environment": "verifiers:x", "tools": ("a:b",)}, "tools cannot be given with an environment of verifiers"),
    ],
)
def test_keys_that_do_not_go_together(keys: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        RowsData.model_validate({"kind": "rows", **keys})


RECIPE = f"""
[model.tiny]
tokenizer = "bytes"
hidden_size = 16
num_layers = 1
num_heads = 2
num_kv_heads = 1
intermediate_size = 16
max_model_len = 128
[data.single]
kind = "rows"
environment = "{PLACE}"
eval_split = "eval"
[data.count]
kind = "rows"
environment = "{PLACE}"
environment_arguments = {{ shape = "count" }}
eval_share = 0.2
[sampling]
max_new_tok = 64
samples_per_prompt = 8
[[stage]]
name = "rl"
steps = 2
batch = {{ prompts = 4 }}
mixture = [{{ data = "single" }}, {{ data = "count" }}]
[eval]
data = "single"
representations = ["natural"]
prompts = 1
max_new_tok = 2
[run]
threads = 1
completions_every = 1
"""


def test_a_run_trains_on_its_rows_and_rewards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 1)  # one worker: each imports the package
    (tmp_path / "recipe.toml").write_text(RECIPE)
    (tmp_path / "run").mkdir()
    recipe = load_recipe(tmp_path / "recipe.toml", [], Recipe)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    summary = run_recipe(recipe, tmp_path / "run", Console(file=io.StringIO()), lambda: False, ALONE, resume=False)
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert summary["environments"] == {
        **{"errors": 0, "timeouts": 0, "crashes": 0, "rows_skipped": 0},
        "out_of_turns": 0,
    }
    assert any(row["response/turns"] > 1 for row in read_steps(tmp_path / "run"))
    ended = 0
    for file in sorted((tmp_path / "run" / "completions").glob("step-*.jsonl")):
        for row in map(json.loads, file.read_text().splitlines()):
            if row["finish"] == "stop" and row.get("turns", 1) == 1 and "Be brief." in row["prompt"]:
                environment = load("single")
                (asked,) = [r for r in environment.build_dataset() if r["question"] in row["prompt"]]
                assert row["reward"] == pytest.approx(by_hand(environment, asked, [model(row["text"])]))
                ended += 1
    assert ended > 3
