"""Users' reward functions: told apart by signature, called in workers, and what the bad ones cost."""

import asyncio
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from isomorph.curriculum.rewards import Answer
from isomorph.curriculum.rewards import worker as worker_module
from isomorph.curriculum.rewards.pool import RewardPool
from isomorph.curriculum.rewards.signature import Progress
from isomorph.curriculum.rewards.spec import Overlong, RewardEntry, RewardTable
from isomorph.curriculum.rewards.table_judge import Source, TableJudge, soft_overlong
from isomorph.curriculum.tasks.task import Task
from isomorph.engine.config import UserError
from isomorph.engine.types import Prompt, Rollout, RunFailed, Scores

USERS = Path(__file__).parent / "rewards_of_users"
ROW = {"question": "How many?", "answer": "70 + 2\n#### 72", "index": 4}
COLUMNS = frozenset(ROW)


def place(name: str) -> str:
    return str(USERS / name)


def entry(function: str, **keys: Any) -> RewardEntry:
    return RewardEntry(function=place(function) if ".py" in function else function, **keys)


def prompt(prompt_id: int = 0, **keys: Any) -> Prompt:
    given = {"row": ROW, "answer": "72", "question": "How many?", **keys}
    task = Task(family="rows", representation="natural", key=str(prompt_id), data="gsm", **given)
    return Prompt(prompt_id=prompt_id, token_ids=(1,), task="rows", representation="natural", payload=task)


def rollout(prompt_id: int, sample: int, num_tok: int = 4, finish: str = "stop") -> Rollout:
    return Rollout(
        prompt_id=prompt_id,
        sample=sample,
        token_ids=torch.arange(num_tok) % 3,
        sampler_logprob=None,
        finish=finish,  # type: ignore[arg-type]
        policy_version=0,
    )


class Asked:
    """The scores of some texts to one prompt, or to several, by a table; and what was said."""

    def __init__(self, *entries: RewardEntry, log: Path | None = None, workers: int = 1, **table: Any) -> None:
        self.said: list[str] = []
        self.table = RewardTable(rewards=entries, **table)
        self.judge = TableJudge(
            {"gsm": Source(table=self.table, columns=COLUMNS)},
            RewardPool(),
            log=log,
            say=self.said.append,
            max_new_tok=lambda prompt: 10,
            progress=lambda: Progress(step=7, max_steps=9),
            max_workers=workers,
        )

    def __call__(
        self, texts: Sequence[str], prompts: Sequence[Prompt] | None = None, rollouts: Sequence[Rollout] | None = None
    ) -> Scores:
        prompts = prompts or [prompt()] * len(texts)
        known = rollouts or [rollout(p.prompt_id, i) for i, p in enumerate(prompts)]
        with self.judge as judge:
            judge.start()
            return judge.score(prompts, texts, known)


TEXTS = ["It is 72", "#### 72", "#### 71", "nothing"]
CHAT = ({"role": "user", "content": "How many?"},)


def test_what_users_of_trl_and_verl_have_gives_what_it_gives_when_called_by_hand() -> None:
    import tests.curriculum.rewards_of_users.trl_form as trl_form  # type: ignore[import-not-found]
    import tests.curriculum.rewards_of_users.verl_form as verl_form  # type: ignore[import-not-found]

    scores = Asked(
        entry("trl_form.py:number_reward"),
        entry("trl_form.py:short_reward"),
        entry("trl_form.py:patient_reward"),
        entry("trl_form.py:Scaled", arguments={"factor": 0.5}),
        entry("verl_form.py:compute_score"),
        entry("verl_form.py:compute_score_batch"),
    )(TEXTS)
    gold = [ROW["answer"]] * 4
    assert scores.parts["number_reward"] == tuple(trl_form.number_reward(TEXTS, gold)) == (1, 1, 0, 0)
    assert scores.parts["short_reward"] == (7 - 0.4,) * 4  # step 7, four tokens each
    by_hand = asyncio.run(trl_form.patient_reward(["How many?"] * 4, TEXTS))
    assert scores.parts["patient_reward"] == tuple(by_hand)
    assert scores.parts["Scaled"] == tuple(trl_form.Scaled(0.5)(TEXTS))
    verl = [verl_form.compute_score("gsm", text, "72", ROW) for text in TEXTS]
    assert scores.parts["compute_score"] == tuple(v["score"] if isinstance(v, dict) else v for v in verl)
    batch = verl_form.compute_score_batch(["gsm"] * 4, TEXTS, ["72"] * 4, [ROW] * 4)
    assert scores.parts["compute_score_batch"] == tuple(batch)
    assert scores.rewards == pytest.approx([sum(part[i] for part in scores.parts.values()) for i in range(4)])
    assert scores.correct == (True, True, False, False)  # by the first reward


def test_trls_own_functions_run_unchanged() -> None:
    rewards = pytest.importorskip("trl.rewards")
    texts = [r"so \boxed{\frac{1}{2}}", r"\boxed{0.25}", "no answer"]
    asked = [prompt(row={"solution": r"$\frac{1}{2}$"})] * 3
    judge = Asked(
        entry("trl.rewards:accuracy_reward"),
        entry("trl.rewards:get_soft_overlong_punishment", arguments={"max_completion_len": 6, "soft_punish_cache": 4}),
        entry("trl.rewards:get_repetition_penalty_reward", arguments={"ngram_size": 1}),
        entry("repetition", arguments={"ngram": 1}),
        entry("math"),
    )
    judge.judge._columns[:] = [frozenset({"solution"})] * len(judge.judge._columns)
    rollouts = [rollout(0, i, 5) for i in range(3)]
    scores = judge(texts, asked, rollouts)
    as_messages = [[{"role": "assistant", "content": text}] for text in texts]
    assert scores.parts["accuracy_reward"] == tuple(rewards.accuracy_reward(as_messages, [r"$\frac{1}{2}$"] * 3))
    ids = [r.token_ids.tolist() for r in rollouts]
    assert scores.parts["get_soft_overlong_punishment"] == tuple(rewards.get_soft_overlong_punishment(6, 4)(ids))
    repeated = rewards.get_repetition_penalty_reward(ngram_size=1)(ids)
    assert scores.parts["get_repetition_penalty_reward"] == tuple(repeated) == scores.parts["repetition"]
    assert scores.parts["math"] == (0.0, 0.0, 0.0)  # the gold of ``prompt`` is 72
    assert judge.said == []


def test_rows_of_verl_bring_their_own_ground_truth() -> None:
    row = {"data_source": "openai/gsm8k", "reward_model": {"ground_truth": "9", "style": "rule"}, "extra_info": {}}
    scores = Asked(entry("verl_form.py:compute_score"))(["#### 9"], [prompt(row=row)])
    assert scores.rewards == (1.0,)


@pytest.mark.parametrize(
    ("function", "texts", "outcomes", "sentence"),
    [
        ("text", ["1"], ["error"], "must return a number, got str 'good'"),
        ("nan", ["1"], ["nan"], "must return a finite number, got nan"),
        ("raises", ["1", "7", "8", "17"], ["value", "error", "value", "error"], "bad.py, line 21, in raises: ValueErr"),
        ("too_few", ["1", "2"], ["error", "error"], "one reward for each of 2 responses, got 1"),
        ("hangs", ["1", "3", "4"], ["value", "deadline", "value"], "must return within 1 s"),
        ("waits", ["1", "3", "4", "13"], ["value", "deadline", "value", "deadline"], "must return within 1 s"),
        ("hangs_and_catches_all", ["1", "3", "4"], ["value", "deadline", "value"], "its process was killed"),
        ("exits", ["4", "5", "6"], ["value", "error", "value"], "ended the process that called it (exit code 3)"),
        ("leaves", ["1"], ["error"], "SystemExit: I have had enough"),
    ],
)
def test_what_a_function_does_wrong_costs_the_response_alone(
    function: str, texts: list[str], outcomes: list[str], sentence: str
) -> None:
    asked = Asked(entry(f"bad.py:{function}"), deadline_s=1.0)
    scores = asked(texts)
    assert list(scores.outcomes[function]) == outcomes
    assert list(scores.rewards) == [float(outcome == "value") for outcome in outcomes]
    (said,) = asked.said  # once for each kind
    assert f"reward {function} of data.gsm: " in said and sentence in said
    failed = [outcome for outcome in outcomes if outcome != "value"]
    assert asked.judge.counts.by_name == {function: {failed[0]: len(failed)}}


def test_a_fork_and_much_output_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "rewards.log"
    scores = Asked(entry("bad.py:forks"), entry("bad.py:prints"), log=log)(["1"] * 20)
    assert scores.rewards == (2.0,) * 20
    assert worker_module.MAX_LOG_BYTES <= log.stat().st_size < worker_module.MAX_LOG_BYTES + 100
    assert log.read_bytes().endswith(b"is not kept]\n")


def test_random_numbers_do_not_depend_on_who_is_called_when() -> None:
    prompts = [prompt(3)] * 2 + [prompt(4)] * 2
    both = Asked(entry("bad.py:draws"))(["a", "b", "c", "d"], prompts).rewards
    assert len(set(both)) == 4
    assert Asked(entry("bad.py:draws"))(["c", "d"], prompts[2:]).rewards == both[2:]


def test_on_error_stop_ends_the_run() -> None:
    with pytest.raises(RunFailed, match=r"reward nan of data.gsm: .*data.gsm.on_error is \"stop\""):
        Asked(entry("bad.py:nan"), on_error="stop")(["1"])


@pytest.mark.parametrize(
    ("function", "sentence"),
    [
        ("bad.py:fits_nothing", r"its parameters \(left, right\) fit none of f\(answer: Answer\), TRL's"),
        ("bad.py:nothing_there", "it has no 'nothing_there'; it has text, nan, raises"),
        ("bad.py:SEVEN", "must be a function, got int"),
        ("bad.py:needs_a_column", "has the parameter 'solution', which must be a column .* answer, index, question"),
        ("missing.py:f", "missing.py:f: there is no such file"),
        ("no.such.package:f", "there is no package no"),
    ],
)
def test_a_function_that_cannot_be_used_is_refused_before_the_first_step(function: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        Asked(entry(function))(["1"])


def test_a_file_that_breaks_or_ends_its_process_while_it_is_imported_is_refused(tmp_path: Path) -> None:
    for text, sentence in (
        ("import math\nmath.no_such_name\n", "line 2, in <module>: AttributeError"),
        ("def f(:\n", "line 1: SyntaxError"),
        ("import os\nos._exit(0)\n", "must be imported without ending its process"),
    ):
        (tmp_path / "broken.py").write_text(text)
        with pytest.raises(UserError, match=sentence):
            Asked(RewardEntry(function=f"{tmp_path / 'broken.py'}:f"))(["1"])


def test_unknown_names_and_arguments_are_refused_in_the_recipe() -> None:
    with pytest.raises(ValueError, match="did you mean numeric"):
        entry("numerik")
    with pytest.raises(ValueError, match="key beside rewards"):
        entry("overlong")
    with pytest.raises(ValueError, match=r"two rewards would be logged as 'exact'.*rewards\[1\]"):
        RewardTable(rewards=(entry("exact"), entry("exact")))
    with pytest.raises(UserError, match="numeric takes no argument 'tolerans'"):
        Asked(entry("numeric", arguments={"tolerans": 1}))(["1"])
    with pytest.raises(UserError, match="builtin:formatted: .*missing \\), unterminated"):
        Asked(entry("formatted", arguments={"pattern": "("}))(["1"])
    with pytest.raises(UserError, match="cosine: .*of must be one of exact, numeric"):
        Asked(entry("cosine", arguments={"max_tok": 5, "of": "math"}))(["1"])


def test_rewards_are_combined_and_those_that_do_not_apply_left_out() -> None:
    rows = [prompt(0), prompt(1, row={"answer": "no number"})]
    prompts, texts = [rows[0], rows[0], rows[1], rows[1]], ["#### 72", "72", "#### 1", "1"]
    entries = (entry("trl_form.py:number_reward", weight=2.0), entry("formatted", weight=0.5))
    scores = Asked(*entries)(texts, prompts)
    assert scores.rewards == (2.5, 2.0, 0.5, 0.0)
    assert scores.outcomes["number_reward"] == ("value", "value", "none", "none")
    assert Asked(*entries, combine="product")(texts, prompts).rewards == (1.0, 0.0, 0.5, 0.0)
    alone = Asked(entries[0])(texts, prompts)
    assert alone.rewards[:2] == (2.0, 2.0) and all(math.isnan(reward) for reward in alone.rewards[2:])


def test_overlong_is_daposs_equation_13_and_cut_off_responses_are_masked() -> None:
    trl = pytest.importorskip("trl.rewards").get_soft_overlong_punishment(10, 4)
    lengths = [1, 6, 7, 9, 10, 11]
    assert [soft_overlong(n, 10, 4) for n in lengths] == trl([[0] * n for n in lengths]) == [0, 0, -0.25, -0.75, -1, -1]
    rollouts = [rollout(0, 0, 6), rollout(0, 1, 8), rollout(0, 2, 10, finish="length")]
    asked = Asked(entry("numeric"), overlong=Overlong(soft=4, penalty=0.5), mask_truncated=True)
    scores = asked(["72", "72", "72"], rollouts=rollouts)
    assert scores.rewards == (1.0, 0.75, 0.5) and scores.parts["overlong"] == (0, -0.25, -0.5)
    assert scores.masked == (False, False, True) and scores.correct == (True,) * 3


def built_in(name: str, text: str, gold: str, **arguments: Any) -> float | None:
    from isomorph.curriculum.rewards import builtin

    function = getattr(builtin, builtin.BUILTINS[name].function)
    found: float | None = function(Answer(prompt="", text=text, gold=gold, num_tok=5), **arguments)
    return found


@pytest.mark.parametrize(
    ("name", "text", "gold", "reward"),
    [
        ("exact", " Paris ", "Paris", 1),
        ("exact", "I say <answer>Paris</answer>.", "Paris", 1),
        ("exact", "paris", "Paris", 0),
        ("numeric", "so 1,072 it is", "#### 1072", 1),
        ("numeric", "#### 72", "3 * 24 = 71 + 1\n#### 72", 1),
        ("numeric", "10-5 is 5", "5", 1),
        ("numeric", "#### 3,4", "34", 0),  # a list: its last number counts
        ("numeric", "<answer>34</answer>", "(3,4)", 0),
        ("numeric", "<answer>(3,4)</answer>", "4", 1),
        ("numeric", "in 2019,2020", "2020", 1),
        ("numeric", "12,34,567", "1234567", 1),
        ("numeric", r"\boxed{1{,}000}", "1,000", 1),
        ("numeric", "x = \N{MINUS SIGN}3", "-3", 1),
        ("numeric", "x = \N{MINUS SIGN}3", "3", 0),
        ("numeric", "-5", "5", 0),
        ("numeric", "it is 1/2", "0.5", 1),
        ("numeric", r"\boxed{7} of 9", "7", 1),
        ("numeric", "none", "5", 0),
        ("numeric", "5", "no number", None),
        ("choice", "The answer is (b).", "B", 1),
        ("choice", "The answer is a matter of taste.", "A", 0),
        ("choice", "the answer is a, since b is wrong", "A", 1),
        ("choice", "The answer is A because of it", "A", 1),
        ("choice", "A is wrong, C too.\nD", "D", 1),
        ("choice", "<answer>C</answer>", "C. Paris", 1),
        ("choice", "A or B", "A", 0),
        ("choice", "A", "none of them: 7", None),
        ("formatted", "x #### 7", "", 1),
        ("formatted", "7", "", 0),
        ("async_plan", "<answer>80 min</answer>", "1 hour 20 min", 1),
        ("math", r"it is $\frac{2}{4}$", r"\frac{1}{2}", 1),
        ("math", r"\boxed{x+1}", "1+x", 1),
        ("math", "3", "4", 0),
        ("math_sympy", r"\boxed{(x+1)^2}", "x^2+2x+1", 1),
        ("physics", "<answer>36 km/h</answer>", "10 m/s", 1),
    ],
)
def test_built_in_rewards(name: str, text: str, gold: str, reward: float | None) -> None:
    assert built_in(name, text, gold) == reward


def test_built_in_rewards_with_arguments() -> None:
    assert built_in("numeric", "3.14", "3.14159", tolerance=1e-3) == 1
    assert built_in("numeric", "72", "72", strict=True) == 0
    assert built_in("exact", "PARIS", "Paris", ignore_case=True) == 1
    assert built_in("formatted", "<think>a\nb</think> 7", "", pattern=r"<think>.*</think>.*") == 1
    assert built_in("cosine", "72", "72", max_tok=10) == pytest.approx(0.75)  # halfway, as TRL's docstring has it
    assert built_in("cosine", "71", "72", max_tok=10) == pytest.approx(-0.75)
    assert built_in("cosine", "71", "72", max_tok=5) == pytest.approx(-0.5)
