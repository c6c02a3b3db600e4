"""Environments in worker processes: what they say, what they cost where they fail, tool calls, chat templates."""

import dataclasses
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers

from isomorph.curriculum.environments.calls import CallFormat, called
from isomorph.curriculum.environments.dialogue import EnvironmentDialogue, Turns
from isomorph.curriculum.environments.done import Done
from isomorph.curriculum.environments.pool import Call, EnvironmentPool
from isomorph.curriculum.environments.template import call_format
from isomorph.curriculum.environments.worker import EnvironmentSpec, Outcome
from isomorph.curriculum.tasks.task import Task
from isomorph.engine.config import UserError
from isomorph.engine.model.reply import HEARD, ReplyFormat
from isomorph.engine.model.text import ANSWER, PROBE, WORD, TextCodec, word_tokenizer
from isomorph.engine.types import Prompt, Reply

GAME = '''
import os, random, time
from isomorph.curriculum.environments.done import Done

class Game:
    """Counts its steps; does what it is told."""

    def __init__(self, end=3):
        self.end, self.count = end, 0

    def reset(self, row, seed):
        self.secret = random.random() if row.get("global") else seed
        return [{"role": "user", "content": f"start {row['n']}"}]

    def step(self, text):
        self.count += 1
        if text == "raise":
            raise KeyError("a")
        if text == "hang":
            while True:
                pass
        if text == "swallow":
            while True:
                try:
                    time.sleep(60)
                except BaseException:
                    pass
        if text == "die":
            os._exit(3)
        if text == "number":
            return 7
        if text == "nan":
            return Done(float("nan"))
        if text == "word":
            return Done("one")
        if text == "empty":
            return []
        if text == "assistant":
            return [{"role": "assistant", "content": "me"}]
        if text == "secret":
            return f"{self.secret} {random.random()}"
        if self.count == self.end:
            return Done(self.count / 4)
        return f"{text} {self.count}"

def add(a: int, b: int) -> int:
    """Adds.

    Args:
        a: one
        b: other
    """
    return a + b

def slow(a: int) -> int:
    """Sleeps.

    Args:
        a: seconds
    """
    time.sleep(a)
    return a

def undescribed(a):
    return a
'''


@pytest.fixture(scope="module")
def game(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("game") / "game.py"
    path.write_text(GAME)
    return path


@pytest.fixture(scope="module")
def pool() -> Iterator[EnvironmentPool]:
    with EnvironmentPool(max_workers=1) as pool:
        yield pool


def make_spec(game: Path, **changes: Any) -> EnvironmentSpec:
    fields: dict[str, Any] = dict(
        environment=f"{game}:Game", tools=(), arguments={}, deadline_s=2.0, calls=CallFormat()
    )
    return EnvironmentSpec(**{**fields, **changes})


def first_of(spec: EnvironmentSpec) -> tuple[dict[str, Any], ...]:
    return () if spec.environment is None else ({"role": "user", "content": "start 1"},)


def ask(pool: EnvironmentPool, spec: EnvironmentSpec, key: int, *said: str, **row: Any) -> Outcome:
    return pool.step(Call(spec, key, {"n": 1, **row}, 5, first_of(spec), said)).result(timeout=60)


# -- environments
def test_an_environment_goes_on_from_turn_to_turn(pool: EnvironmentPool, game: Path) -> None:
    spec, key = make_spec(game), pool.new_key()
    assert pool.reset(spec, {"n": 4}, 5).messages == ({"role": "user", "content": "start 4"},)
    assert ask(pool, spec, key, "a").messages == ({"role": "user", "content": "a 1"},)
    assert ask(pool, spec, key, "a", "b").messages == ({"role": "user", "content": "b 2"},)
    assert ask(pool, spec, key, "a", "b", "c").done == Done(0.75)
    short = make_spec(game, arguments={"end": 1})
    assert ask(pool, short, pool.new_key(), "a").done == Done(0.25)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("raise", r"KeyError: 'a' \(.*game.py:18\)"),
        ("number", r"TypeError: step must return messages .*, got 7"),
        ("nan", r"ValueError: the reward in Done must be a finite number or None, got nan"),
        ("word", r"ValueError: the reward in Done must be a finite number or None, got 'one'"),
        ("empty", r"ValueError: step must return messages .*, got nothing to say"),
        ("assistant", r"ValueError: step must not return a message of the assistant"),
    ],
)
def test_what_an_environment_does_wrong_is_named(pool: EnvironmentPool, game: Path, text: str, sentence: str) -> None:
    before = pool.failures["errors"]
    outcome = ask(pool, make_spec(game), pool.new_key(), text)
    assert re.match(sentence, outcome.failed), outcome.failed
    assert pool.failures["errors"] == before + 1


@pytest.mark.parametrize(("text", "kind"), [("hang", "timeouts"), ("swallow", "timeouts"), ("die", "crashes")])
def test_a_rollout_that_hangs_or_dies_costs_itself_alone(
    pool: EnvironmentPool, game: Path, text: str, kind: str
) -> None:
    spec, own, other = make_spec(game), pool.new_key(), pool.new_key()
    before = pool.failures[kind]
    assert ask(pool, spec, other, "a").messages == ({"role": "user", "content": "a 1"},)
    started = time.monotonic()
    assert ask(pool, spec, own, text).failed
    assert time.monotonic() - started < 30  # of 60
    assert pool.failures[kind] == before + 1
    assert ask(pool, spec, other, "a", "b").messages == ({"role": "user", "content": "b 2"},)  # even in a new process


def test_random_numbers_are_those_of_the_seed(pool: EnvironmentPool, game: Path) -> None:
    spec = make_spec(game)
    first = [ask(pool, spec, pool.new_key(), "secret", **{"global": True}).messages[0]["content"] for _ in range(2)]
    key = pool.new_key()
    ask(pool, spec, key, "a", **{"global": True})
    ask(pool, spec, pool.new_key(), "die")
    rebuilt = ask(pool, spec, key, "a", "secret", **{"global": True}).messages[0]["content"]
    assert first[0] == first[1]
    assert rebuilt.split()[0] == first[0].split()[0] and rebuilt != first[0]


@pytest.mark.parametrize(
    ("place", "sentence"),
    [
        ("nowhere.py:Game", "there is no such file"),
        ("game.py:Gaem", "it has no 'Gaem'; it has"),
        ("no_such_package:Game", "there is no package no_such_package"),
    ],
)
def test_a_place_where_nothing_is_is_said_before_the_first_step(
    pool: EnvironmentPool, game: Path, place: str, sentence: str
) -> None:
    home = f"{game.parent}/{place}" if ".py" in place else place
    with pytest.raises(UserError, match=rf"\[data.x\].*cannot be used: .*{sentence}"):
        pool.describe(make_spec(game, environment=home, deadline_s=5.0), "[data.x]")


def test_tools_need_types_and_descriptions(pool: EnvironmentPool, game: Path) -> None:
    (schema,) = pool.describe(
        make_spec(game, tools=(f"{game}:add",), environment=None, calls=CallFormat(is_json=True)), "x"
    ).schemas
    assert schema["function"]["parameters"]["required"] == ["a", "b"]
    with pytest.raises(UserError, match="tool undescribed"):
        pool.describe(
            make_spec(game, tools=(f"{game}:undescribed",), environment=None, calls=CallFormat(is_json=True)), "x"
        )


def test_tools_answer_and_a_turn_without_a_call_is_the_last(pool: EnvironmentPool, game: Path) -> None:
    spec = make_spec(game, tools=(f"{game}:add", f"{game}:slow"), environment=None)
    key = pool.new_key()
    assert ask(pool, spec, key, "so <call> add 3 4 </call>").messages == (
        {"role": "tool", "name": "add", "content": "7"},
    )
    assert ask(pool, spec, key, "", "it is 7").done == Done()
    assert "not over after 2 s" in ask(pool, spec, pool.new_key(), "<call> slow 30 </call>").failed


TRL_FORM = '''
class Counter:
    """As TRL's documentation has it."""

    def __init__(self):
        self.count = 0

    def reset(self, **kwargs) -> str | None:
        self.count = kwargs["start"]
        return f" The counter is {self.count}."

    def add(self, a: int) -> int:
        """Adds to the counter.

        Args:
            a: how much
        """
        self.count += a
        return self.count

    def get_reward(self) -> float:
        return self.count / 10
'''


def test_a_class_of_trls_environment_factory_works_unchanged(pool: EnvironmentPool, tmp_path: Path) -> None:
    (tmp_path / "trl_form.py").write_text(TRL_FORM)
    spec = make_spec(tmp_path / "trl_form.py", environment=f"{tmp_path}/trl_form.py:Counter")
    told = pool.describe(dataclasses.replace(spec, calls=CallFormat(is_json=True)), "x")
    assert told.has_tools and [s["function"]["name"] for s in told.schemas] == ["add"]
    assert pool.reset(spec, {"start": 2}, 5).added == " The counter is 2."
    first = ({"role": "user", "content": "Count. The counter is 2."},)
    call = Call(spec, pool.new_key(), {"start": 2}, 5, first, ("<call> add 3 </call>",))
    assert pool.step(call).result(timeout=60).messages == ({"role": "tool", "name": "add", "content": "5"},)
    ended = dataclasses.replace(call, said=(*call.said, "done"))
    assert pool.step(ended).result(timeout=60).done == Done(0.5)
    limited = dataclasses.replace(call, key=pool.new_key(), is_last=True)
    assert pool.step(limited).result(timeout=60).done == Done(0.5)


# -- calls
def look(key: int, more: str = "") -> str:
    if key == 13:
        raise LookupError("unlucky")
    return f"{key}{more}"


TOOLS = {"look": look, "pair": lambda x: {"x": x}}


@pytest.mark.parametrize(
    ("text", "results"),
    [
        ("no call", []),
        ("<call> look 3 </call>", ["3"]),
        ("<call>look 3 b</call> and <call>look 4</call>", ["3b", "4"]),
        ("<call> look x </call>", ["error: ValueError"]),
        ("<call> lok 3 </call>", ["error: there is no tool lok, there is look, pair"]),
        ("<call> look 13 </call>", ["error: LookupError: unlucky"]),
        ("<call> look </call>", ["error: TypeError"]),
        ("<call>  </call>", ["error: an empty call"]),
    ],
)
def test_plain_calls(text: str, results: list[str]) -> None:
    found = [m["content"] for m in called(CallFormat(), text, TOOLS)]
    assert len(found) == len(results) and all(f.startswith(r) for f, r in zip(found, results, strict=True)), found


@pytest.mark.parametrize("opening", ["<tool_call>", ""])
@pytest.mark.parametrize(
    ("calls", "results"),
    [
        (['{"name": "look", "arguments": {"key": 3}}'], ["3"]),
        (['{"name": "pair", "arguments": {"x": [1]}}'] * 2, ['{"x": [1]}'] * 2),
        (['{"name": "look", "arguments": "{\\"key\\": 3}"}'], ["3"]),
        (['{"name": "look", "arguments": {"k": 3}}'], ["error: TypeError"]),
        (['{"name": 3}'], ["error: a call has a name and an object arguments"]),
    ],
)
def test_json_calls(opening: str, calls: list[str], results: list[str]) -> None:
    text = "\n".join(f"{opening}\n{call}\n</tool_call>" if opening else call for call in calls)
    found = [m["content"] for m in called(CallFormat(is_json=True, opening=opening), text, TOOLS)]
    assert len(found) == len(results) and all(f.startswith(r) for f, r in zip(found, results, strict=True)), found


def test_a_call_that_is_no_json_is_told_to_the_model() -> None:
    broken = "<tool_call> {'name': } </tool_call>"
    (told,) = called(CallFormat(is_json=True, opening="<tool_call>"), broken, TOOLS)
    assert told["content"].startswith("error: a call must be a JSON object")
    assert called(CallFormat(is_json=True), "{not a call}", TOOLS) == []


# -- chat templates
CHATML = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<call>\n"
    "{{ {'name': c.function.name, 'arguments': c.function.arguments} | tojson }}\n</call>{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_text(template: str | None = CHATML) -> TextCodec:
    said = f"{PROBE} {ANSWER} {HEARD} user assistant tool hello world system start go <call> </call>"
    words = [*dict.fromkeys(re.findall(WORD, said)), "<|im_start|>", "<|im_end|>"]
    tokenizer = word_tokenizer(words)
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    tokenizer.chat_template = template
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    return TextCodec(tokenizer, chat_template=template is not None, stop_ids=[end])


def test_a_conversation_goes_on_as_the_template_would_have_written_it() -> None:
    text = make_text()
    chat = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "world"}]
    more = [{"role": "tool", "content": "42"}, {"role": "user", "content": "go"}]
    whole = text.tokenizer.apply_chat_template([*chat, *more], add_generation_prompt=True, return_dict=False)
    drawn = [*text.encode_prompt("hello"), *text.encode_response("world")]
    assert [*drawn, *ReplyFormat(text).encode(more)] == whole
    ReplyFormat(text).check(["user", "tool"])
    assert drawn[-1] in text.stop_ids  # which a turn that a stop string ended has not
    assert [*drawn[:-1], *ReplyFormat(text).encode(more, is_stopped=False)] == whole


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        ("{% for m in messages %}{{ m.role }} {{ m.content }}{% endfor %}", "no stop token behind an assistant's turn"),
        (
            "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
            "{{ m.content }} <|im_end|>{% endfor %}",
            "does not allow a message of role 'tool'",
        ),
        (
            "{% for m in messages if m.role != 'tool' %}{{ m.content }} <|im_end|>{% endfor %}",
            "drops a message of role 'tool'",
        ),
    ],
)
def test_a_template_that_does_not_go_on_is_refused(template: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        ReplyFormat(make_text(template)).check(["tool"])


@pytest.mark.model
def test_a_real_template_goes_on_token_for_token(smollm2_folder: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2_folder)
    text = TextCodec(tokenizer, chat_template=True, stop_ids=[tokenizer.convert_tokens_to_ids("<|im_end|>")])
    chat = [{"role": "user", "content": "hello there"}, {"role": "assistant", "content": "The answer."}]
    more = [{"role": "user", "content": "And 3 apples?  \n 4"}]
    whole = tokenizer.apply_chat_template([*chat, *more], add_generation_prompt=True, return_dict=False)
    drawn = [*text.encode_prompt("hello there"), *text.encode_response("The answer.")]
    assert [*drawn, *ReplyFormat(text).encode(more)] == list(whole)


def test_without_a_template_messages_are_plain_text() -> None:
    text = make_text(None)
    ids = ReplyFormat(text).encode([{"role": "tool", "content": "42"}, {"role": "user", "content": "go"}])
    assert text.tokenizer.convert_ids_to_tokens(ids) == ["[UNK]", "42", "[UNK]", "go"]  # <result>, </result>


def test_the_form_of_calls_is_the_templates() -> None:
    assert call_format(make_text(), None, {}) == CallFormat(is_json=True, opening="<call>")
    assert call_format(make_text(None), None, {}) == CallFormat()
    bare = CHATML.replace("<call>\n", "").replace("\n</call>", "").replace("'arguments'", "'parameters'")
    assert call_format(make_text(bare), None, {}) == CallFormat(is_json=True, arguments_key="parameters")
    with pytest.raises(UserError, match="describes them to the model"):
        call_format(make_text(CHATML.replace("{{ tools | tojson }}", "")), None, {})
    with pytest.raises(UserError, match="only calls that are a JSON object"):
        call_format(make_text(CHATML.replace("| tojson }}\n</call>", "| string }}")), None, {})


# -- the dialogue
def make_prompt(game: Path, **row: Any) -> Prompt:
    task = Task(
        family="rows",
        representation="natural",
        question="q",
        answer="",
        key="k",
        data="game",
        row={"n": 1, **row},
        messages=({"role": "user", "content": "start 1"},),
    )
    return Prompt(prompt_id=3, token_ids=(1,), task="rows", representation="natural", payload=task)


def test_limits_end_a_conversation(pool: EnvironmentPool, game: Path) -> None:
    text = make_text(None)
    turns = Turns(make_spec(game, arguments={"end": 99}), 2, ReplyFormat(text))
    dialogue = EnvironmentDialogue({"game": turns}, pool, text.decode, seed=0)
    prompt, hello, stop = make_prompt(game), text.encode_prompt("hello")[1:], text.stop_ids
    dialogue.begin(prompt, 0)
    first = dialogue.turn(prompt, 0, [*hello, *stop], 0).result(timeout=60)
    assert text.decode(first.token_ids).startswith("hello")
    second = dialogue.turn(prompt, 0, [*hello, *stop, *first.token_ids, *hello, *stop], 4).result(timeout=60)
    assert second == Reply(failure="out_of_turns")
    dialogue.end(prompt, 0)
    assert not dialogue._open


def test_a_failed_environment_gives_a_reward_of_0(pool: EnvironmentPool, game: Path) -> None:
    text = make_text(None)
    turns = Turns(make_spec(game, arguments={"start": 1}), 2, ReplyFormat(text))
    dialogue = EnvironmentDialogue({"game": turns}, pool, text.decode, seed=0)
    prompt = make_prompt(game)
    dialogue.begin(prompt, 0)
    reply = dialogue.turn(prompt, 0, [5, *text.stop_ids], 0).result(timeout=60)
    assert reply == Reply(reward=0.0, failure="errors")
    dialogue.end(prompt, 0)
    json.dumps(dict(pool.failures))
