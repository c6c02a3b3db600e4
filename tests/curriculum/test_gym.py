"""Tasks of reasoning-gym: which are for training, and their scorers."""

import json
from typing import Any

import pytest

from isomorph.curriculum.recipe import Recipe
from isomorph.curriculum.rewards.answer import Answer
from isomorph.curriculum.rows.gym import GymSource, Scorer
from isomorph.curriculum.rows.gym_spec import ReasoningGymData
from isomorph.curriculum.stage import Curriculum
from isomorph.curriculum.tasks.task import Task
from isomorph.engine.config import UserError
from isomorph.engine.model.text import TextCodec, byte_tokenizer
from isomorph.engine.recipe_file import check_tables

reasoning_gym = pytest.importorskip("reasoning_gym")
SMALL = {"chain_sum": {"max_terms": 2, "max_digits": 1}}  # few different questions: they come again and again


def codec() -> TextCodec:
    return TextCodec(byte_tokenizer(), chat_template=False, stop_ids=[1])


def source(**keys: Any) -> GymSource:
    return GymSource(ReasoningGymData(kind="reasoning_gym", **keys), codec(), "gym")


def drawn(one: GymSource, name: str, count: int) -> list[Task]:
    tasks, position = [], 0
    for _ in range(count):
        task, position = one.draw(name, position, 0)
        tasks.append(task)
    return tasks


def test_no_question_is_trained_on_and_evaluated_even_where_there_are_few() -> None:
    one = source(tasks=SMALL)
    train, held_out = drawn(one, "chain_sum", 300), one.held_out_tasks("chain_sum", 60)
    assert len({t.question for t in train}) > 100 and not {t.question for t in train} & {t.question for t in held_out}
    assert held_out == source(tasks=SMALL).held_out_tasks("chain_sum", 60) != held_out[1:]
    assert [t.key for t in drawn(source(tasks=SMALL, seed=1), "chain_sum", 9)] != [t.key for t in train[:9]]


def test_seeds_next_to_each_other_would_share_their_entries() -> None:
    """Why the splits' seeds lie far apart: the package draws entry i of seed s from s + i."""
    first, second = (reasoning_gym.create_dataset("chain_sum", seed=seed, size=9) for seed in (5, 6))
    assert first[3]["question"] == second[2]["question"]


def test_the_tasks_own_scorer_is_the_reward() -> None:
    one = source(tasks={"leg_counting": {}, "countdown": {"min_numbers": 3, "max_numbers": 3}}, system="Be brief.")
    score = Scorer()
    for name in ("leg_counting", "countdown"):
        dataset = reasoning_gym.create_dataset(name)
        for task in drawn(one, name, 5):
            assert task.messages is not None and task.messages[0] == {"role": "system", "content": "Be brief."}
            assert task.representation == task.row["metadata"]["source_dataset"] == name
            for stated in (task.answer, "7", "not a number"):
                for text in (f"so <answer>{stated}</answer>", f"so \\boxed{{{stated}}}"):
                    answer = Answer(prompt=task.question, text=text, gold=task.answer, row=task.row)
                    assert score(answer) == dataset.score_answer(stated, task.row)
            assert score(Answer(prompt="", text=f"so {task.answer}", gold="", row=task.row)) == 0.0
    assert ReasoningGymData(kind="reasoning_gym", tasks=SMALL).rewards[0].label == "reasoning_gym"


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (dict(tasks={"chess": {}}), "data.gym.tasks: reasoning-gym has no task 'chess'; it has"),
        (
            dict(tasks={"chain_sum": {"max_term": 2}}),
            "chain_sum: reasoning-gym refuses its arguments: .*max_term",
        ),
        (
            dict(tasks={"chain_sum": {"min_terms": -1}}),
            "chain_sum: reasoning-gym refuses its arguments: .*positive",
        ),
        (dict(tasks=SMALL, prompt="{problem}"), "data.gym.prompt: there is no column 'problem'"),
    ],
)
def test_a_wrong_key_is_one_sentence(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        source(**keys)


def test_questions_that_do_not_fit_are_left_out_and_counted() -> None:
    one = source(tasks={"leg_counting": {}}, max_prompt_tok=300)
    assert all(len(codec().encode_prompt(task.question)) <= 300 for task in drawn(one, "leg_counting", 20))
    assert one.summary()["left_out"]["leg_counting"] > 0
    with pytest.raises(UserError, match="none of 2000 questions is for training and fits"):
        drawn(source(tasks=SMALL, max_prompt_tok=9), "chain_sum", 1)


def test_a_recipe_trains_on_two_tasks_and_goes_on_where_it_was() -> None:
    tables = {
        "model": {"tiny": {"tokenizer": "bytes"}},
        "data": {"gym": {"kind": "reasoning_gym", "tasks": {**SMALL, "leg_counting": {}}, "max_prompt_tok": 300}},
        "stage": [
            {"name": "rl", "steps": 1, "mixture": [{"data": "gym", "representation": "leg_counting"}]},
        ],
        "eval": {"data": "gym", "representations": ["chain_sum", "leg_counting"], "prompts": 3},
    }
    recipe = check_tables(tables, Recipe, where="test")
    one, other = (Curriculum(recipe, codec(), 2048) for _ in range(2))
    one.take(20)
    left_out = one.sources["gym"].num_too_long["leg_counting"]
    assert left_out > other.sources["gym"].num_too_long.get("leg_counting", 0)
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert other.sources["gym"].num_too_long["leg_counting"] == left_out  # it does not begin again
    assert one.take(100) == other.take(100)
    assert one.sources["gym"].summary() == other.sources["gym"].summary() != {"left_out": {"leg_counting": left_out}}
    request = one.pending_evaluation()
    assert request is not None
    assert [prompt.representation for prompt in request.prompts] == ["chain_sum"] * 3 + ["leg_counting"] * 3
