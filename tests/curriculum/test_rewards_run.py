"""Whole runs of a tiny model over rows, rewarded by files of TRL's, verl's and our form."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import TINY, completions, run, summary_of, write_rows

from isomorph.curriculum.inputs import changed_rewards, located
from isomorph.curriculum.recipe import Recipe
from isomorph.curriculum.report.run_record import read_run_json
from isomorph.engine.config import UserError
from isomorph.engine.recipe_file import load_recipe
from isomorph.engine.record.runlog import read_steps

RECIPE = (
    TINY
    + """\
max_model_len = 128
[data.gsm]
kind = "rows"
path = "rows.jsonl"
prompt = "{question}"
answer = "{answer}"
eval_share = 0.2
rewards = [REWARDS]
[sampling]
max_new_tok = 6
samples_per_prompt = 4
[[stage]]
name = "rl"
steps = 3
batch = { prompts = 4 }
optim = { lr = 1e-2 }
mixture = [{ data = "gsm" }]
[eval]
data = "gsm"
representations = ["natural"]
prompts = 2
max_new_tok = 4
[run]
threads = 1
checkpoint_every = 2
completions_every = 1
"""
)
FILES = {
    "trl": "def reward(prompts, completions, answer, **kwargs):\n"
    "    return [len(set(text.split()) & set(gold.split())) / 4 for text, gold in zip(completions, answer)]\n",
    "verl": "def reward(data_source, solution_str, ground_truth, extra_info):\n"
    "    return {'score': len(solution_str) % 5 / 4 + (ground_truth.split()[-1] in solution_str)}\n",
    "ours": "from isomorph.curriculum.rewards import Answer\n\n\ndef reward(answer: Answer) -> float:\n"
    "    return answer.num_tok / 10 + len(answer.text) % 3 + (answer.finish == 'stop')\n",
}


def write(folder: Path, rewards: str, files: dict[str, str] = FILES) -> Path:
    """The recipe, its rows in GSM8K's form, and the files of reward functions, beside it."""
    folder.mkdir(exist_ok=True)
    rows = [
        {"question": f"{a} plus {b} is", "answer": f"{a} + {b} = {a + b}\n#### {a + b}"}
        for a in range(5)
        for b in range(4)
    ]
    write_rows(folder / "rows.jsonl", rows)
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    (folder / "recipe.toml").write_text(RECIPE.replace("REWARDS", rewards))
    return folder / "recipe.toml"


ALL = ", ".join(f'{{ function = "{name}.py:reward", name = "{name}" }}' for name in FILES)


def by_hand(name: str, row: dict[str, Any], question: str, gold: str) -> float:
    names: dict[str, Any] = {}
    exec(FILES[name], names)
    if name == "trl":
        return float(names["reward"]([question], [row["text"]], [gold])[0])
    if name == "verl":
        return float(names["reward"]("gsm", row["text"], gold, {})["score"])
    num_tok = round(10 * (row["rewards"]["ours"] % 1))  # the one thing that completions do not say
    answer = names["Answer"](
        prompt=question, text=row["text"], gold=gold, row={}, finish=row["finish"], num_tok=num_tok
    )
    return float(names["reward"](answer))


def test_files_of_each_form_train_and_give_what_they_give_when_called_by_hand(tmp_path: Path) -> None:
    recipe = write(tmp_path, ALL)
    folder, printed = run(recipe, "run")
    gold = {r["question"]: r["answer"] for r in map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines())}
    rows = completions(folder)
    assert len(rows) == 3 * 4 * 4
    for row in rows:
        question = next(q for q in gold if q in row["prompt"])
        for name in FILES:
            assert row["rewards"][name] == pytest.approx(by_hand(name, row, question, gold[question]))
        assert row["reward"] == pytest.approx(sum(row["rewards"].values()))
        assert row["correct"] == (row["rewards"]["trl"] >= 1)
    steps = read_steps(folder)
    assert [step["updates"] for step in steps] == [1, 1, 1]
    for name in FILES:
        of_step = [row["rewards"][name] for row in rows[:16]]
        assert steps[0][f"reward/{name}/mean"] == pytest.approx(sum(of_step) / 16)
        assert steps[0][f"reward/{name}/errors"] == steps[0][f"reward/{name}/none"] == 0
        assert f"{name} " in printed


COUNTDOWN = """
import re


def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    used = [int(n) for n in re.findall(r"[0-9]+", solution_str)]
    own = 0.1 * sum(n in ground_truth["numbers"] for n in used) + (ground_truth["target"] in used)
    return own + (data_source == "countdown") + extra_info["index"] / 8
"""
CHAT = """
def politeness(prompts, completions, **kwargs):
    assert prompts[0][0]["role"] == "system"
    return [len(c[0]["content"]) % 7 + len(p) for p, c in zip(prompts, completions)]
"""
MATH = [
    {"problem": f"Find {a} + {b}.", "level": "Level 1", "solution": f"It is $\\boxed{{{a + b}}}$."}
    for a in range(4)
    for b in range(4)
]
GAME = [
    {
        "data_source": "countdown",
        "prompt": [{"role": "user", "content": f"Make {a + 4} from {a} and 4"}],
        "reward_model": {"ground_truth": {"target": a + 4, "numbers": [a, 4]}, "style": "rule"},
        "extra_info": {"index": a, "split": "train"},
    }
    for a in range(1, 17)
]
TALK = [
    {"chat": [{"role": "system", "content": "Be kind"}, {"role": "user", "content": f"hello {a}"}]} for a in range(16)
]


def of_math(text: str, row: dict[str, Any]) -> float:
    from trl.rewards import accuracy_reward

    (found,) = accuracy_reward([[{"role": "assistant", "content": text}]], [row["solution"]])
    return float(found)


def of_file(source: str, name: str, *arguments: Any, **keywords: Any) -> Any:
    names: dict[str, Any] = {}
    exec(source, names)
    return names[name](*arguments, **keywords)


@pytest.mark.parametrize(
    ("rows", "keys", "function", "by_hand"),
    [
        (MATH, 'prompt = "problem"', "trl.rewards:accuracy_reward", of_math),
        (
            GAME,
            "",
            "game.py:compute_score",
            lambda text, row: of_file(
                COUNTDOWN, "compute_score", "countdown", text, row["reward_model"]["ground_truth"], row["extra_info"]
            ),
        ),
        (
            TALK,
            'prompt = "chat"',
            "chat.py:politeness",
            lambda text, row: of_file(CHAT, "politeness", [row["chat"]], [[{"content": text}]])[0],
        ),
    ],
    ids=["MATH", "verl's countdown, Parquet", "chat"],
)
def test_native_rows_train_with_the_reward_that_they_came_with(
    rows: list[dict[str, Any]], keys: str, function: str, by_hand: Any, tmp_path: Path
) -> None:
    pytest.importorskip("math_verify")
    recipe = write(tmp_path, f'{{ function = "{function}" }}', {"game": COUNTDOWN, "chat": CHAT})
    text = recipe.read_text().replace('prompt = "{question}"\nanswer = "{answer}"\n', f"{keys}\n")
    if rows is GAME:
        from pyarrow import Table, parquet

        parquet.write_table(Table.from_pylist(rows), tmp_path / "rows.parquet")
        text = text.replace("rows.jsonl", "rows.parquet")
    else:
        write_rows(tmp_path / "rows.jsonl", rows)
    recipe.write_text(text.replace("steps = 3", "steps = 1"))
    folder, printed = run(recipe, "run")
    (step,) = read_steps(folder)
    name = function.rpartition(":")[2]
    assert step[f"reward/{name}/errors"] == 0, printed
    found = completions(folder)
    assert len(found) == 16
    for given in found:
        (row,) = [row for row in rows if _said(row) in "".join(given["prompt"].split())]
        assert given["reward"] == given["rewards"][name] == pytest.approx(by_hand(given["text"], row))


def _said(row: dict[str, Any]) -> str:
    """What a prompt of the row ends with, without spaces, which the tiny model's tokenizer does not keep."""
    said = row["problem"] if "problem" in row else (row.get("prompt") or row["chat"])[-1]["content"]
    return "".join(said.split())


def test_a_resumed_run_with_rewards_is_bit_equal(tmp_path: Path) -> None:
    draws = 'import random\n\n\ndef reward(answer):\n    print("called")\n    return random.random()\n'
    recipe = write(tmp_path, '{ function = "draws.py:reward" }', {"draws": draws})
    whole, _ = run(recipe, "whole")
    (resumed, _) = run(recipe, "resumed")
    newest = max((resumed / "checkpoints").iterdir())
    for path in newest.iterdir():
        path.unlink()
    newest.rmdir()  # as if it had been killed within step 3
    (tmp_path / "draws.py").write_text(draws + "# mended\n")
    _, printed = run(recipe, "resumed", resume=True)
    assert "draws.py has changed since the run began" in printed and "resuming after step 2" in printed
    assert summary_of(whole)["weights_sha256"] == summary_of(resumed)["weights_sha256"]
    assert (whole / "rewards.log").read_text().count("called") >= 3 * 16
    assert changed_rewards(read_run_json(whole)["files"], located(load_recipe(recipe, [], Recipe)))


def train(program: list[str], recipe: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*program, "train", str(recipe), "--run", str(recipe.parent / "run")],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "COLUMNS": "300"},
    )


def test_a_failing_reward_ends_the_run_with_a_checkpoint_where_the_recipe_says_so(
    tmp_path: Path, warm_isomorph: list[str]
) -> None:
    fails = (
        "def reward(completions, trainer_state):\n    if trainer_state.global_step == 1:\n"
        "        raise KeyError('row 41')\n    return [len(text) for text in completions]\n"
    )
    recipe = write(tmp_path, '{ function = "fails.py:reward" }', {"fails": fails})
    recipe.write_text(recipe.read_text().replace("[sampling]", 'on_error = "stop"\n[sampling]', 1))
    done = train(warm_isomorph, recipe)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "fails.py, line 3, in reward: KeyError: 'row 41'" in done.stderr
    assert 'because data.gsm.on_error is "stop"' in done.stderr
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000001"]


def test_a_refused_function_is_one_sentence_and_leaves_no_folder(tmp_path: Path, warm_isomorph: list[str]) -> None:
    files = {"json": "def reward(left, right):\n    pass\n"}  # the name of a module
    done = train(warm_isomorph, write(tmp_path, '{ function = "json.py:reward" }', files))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("error: data.gsm.rewards: ")]) == 1
    assert "json.py:reward: its parameters (left, right) fit none of" in done.stderr
    assert not (tmp_path / "run").exists()


TWO = '{ function = "exact" }, { function = "numeric" }'


@pytest.mark.parametrize(
    ("rewards", "keys", "overrides", "sentence"),
    [
        (TWO, "deadline_s = 1.0", [], "data.gsm.deadline_s has no effect, because the time of these built-in"),
        ('{ function = "exact" }', 'combine = "product"', [], "combine has no effect, because there are not two"),
        (TWO, 'combine = "normalized"', ["objective.name=rft"], 'not supported with objective.name = "rft"'),
        (TWO, 'combine = "normalized"', ["objective.reward_kl_coef=0.1"], "not supported with objective.reward_kl"),
        (
            TWO,
            'combine = "normalized"',
            ["objective.name=reinforce_pp", "sampling.samples_per_prompt=1"],
            "samples_per_prompt must be >= 2",
        ),
        (TWO, 'combine = "normalized"', ["objective.scale=none"], "scale has no effect, because combine"),
        (TWO, "overlong = { soft = 7 }", [], "soft must be at most sampling.max_new_tok, got 7 and 6"),
        ('"exact"', "", [], 'rewards must be a list of tables: rewards = [{ function = "exact" }]'),
        ('{ function = "a.b" }', "", [], "or package.module:name, got 'a.b'"),
        (TWO, "overlong = { soft = 5 }", [], "eval.max_new_tok must be at least overlong.soft, got 4 and 5"),
    ],
)
def test_keys_that_do_not_go_together_are_refused(
    rewards: str, keys: str, overrides: list[str], sentence: str, tmp_path: Path
) -> None:
    recipe = write(tmp_path, rewards)
    recipe.write_text(recipe.read_text().replace("[sampling]", f"{keys}\n[sampling]", 1))
    with pytest.raises(UserError) as refused:
        load_recipe(recipe, overrides, Recipe)
    assert sentence in str(refused.value)


def test_gdpo_with_overlong_and_masks_trains(tmp_path: Path) -> None:
    recipe = write(tmp_path, ALL)
    keys = 'combine = "normalized"\noverlong = { soft = 4 }\nmask_truncated = true\n[sampling]'
    recipe.write_text(recipe.read_text().replace("[sampling]", keys, 1).replace("steps = 3", "steps = 1"))
    folder, _ = run(recipe, "run")
    (step,) = read_steps(folder)
    rows = completions(folder)
    assert step["response/masked"] == sum(row["finish"] == "length" for row in rows)
    assert step["reward/overlong/mean"] <= 0 and step["updates"] == (step["response/masked"] < len(rows))
    assert sum(row["advantage"] for row in rows) == pytest.approx(0, abs=1e-4)


def test_overlong_in_an_evaluation_is_of_its_own_length_limit(tmp_path: Path) -> None:
    """L is 6 in training and 4 in evaluations."""
    length = {"length": "def reward(answer):\n    return float(answer.num_tok)\n"}
    recipe = write(tmp_path, '{ function = "length.py:reward" }', length)
    text = recipe.read_text().replace("[sampling]", "overlong = { soft = 2 }\n[sampling]", 1)
    recipe.write_text(text.replace("steps = 3", "steps = 1"))
    folder, _ = run(recipe, "run")
    evaluated = [row for file in folder.glob("completions/exam-*.jsonl") for row in map(json.loads, file.open())]
    found = {row["reward"] for row in evaluated}
    assert 3.0 in found <= {1.0, 2.0, 3 - 0.5, 4 - 1.0}  # n - (n - (4 - 2)) / 2 from n = 2 on
    assert {row["reward"] for row in completions(folder)} <= {1.0, 2.0, 3.0, 4.0, 5 - 0.5, 6 - 1.0}


def test_answers_are_counted_where_the_family_says_what_an_answer_is(tmp_path: Path) -> None:
    """A mixture of generated tasks, none of which a random model answers, and of rows."""
    recipe = write(tmp_path, '{ function = "exact" }')
    more = '[data.plans]\nkind = "async_plan"\ndifficulty = { form = "terse", demonstration = "compact" }\n[sampling]'
    text = recipe.read_text().replace("[sampling]", more, 1).replace("steps = 3", "steps = 1")
    text = text.replace('{ data = "gsm" }]', '{ data = "gsm" }, { data = "plans", representation = "code" }]')
    sets = 'sets = [{ data = "gsm", prompts = 2 }, { data = "plans", prompts = 2 }]'
    text = text.replace('data = "gsm"\nrepresentations = ["natural"]\nprompts = 2', sets)
    recipe.write_text(text.replace("max_model_len = 128", "max_model_len = 1024"))
    folder, printed = run(recipe, "run")
    (step,) = read_steps(folder)
    assert {row["task"]: row["answered"] for row in completions(folder)} == {"rows": None, "async_plan": False}
    assert step["judge/no_answer"] == step["exam/plans/code/no_answer"] == 1.0
    assert step["exam/gsm/natural/no_answer"] is None
    assert "responses of step 1, the first of stage rl whose task says what an answer is" in printed
    told = summary_of(folder)["exams"][-1]["no_answer"]
    assert told and all(key.startswith("plans:") and share == 1.0 for key, share in told.items())


def test_rows_without_rewards_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="stage 'rl' needs rewards for data 'gsm'"):
        load_recipe(write(tmp_path, ""), [], Recipe)
