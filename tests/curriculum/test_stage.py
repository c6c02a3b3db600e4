"""Stages, their stop conditions and evaluations, and a state that is JSON."""

import json
import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from isomorph.curriculum.recipe import JsonlData, Recipe
from isomorph.curriculum.sources import TaskFiles
from isomorph.curriculum.stage import Curriculum
from isomorph.engine.config import UserError
from isomorph.engine.model.text import TextCodec, word_tokenizer
from isomorph.engine.recipe_file import check_tables, load_recipe
from isomorph.engine.types import Answers, EvaluationRecord, EvaluationRequest, Group, Prompt, Rollout

RECIPES = Path(__file__).parents[2] / "curriculum" / "recipes"
PLANS = {"kind": "async_plan", "difficulty": {"form": "terse", "demonstration": "compact"}}
ONE_TOKEN = torch.tensor([0])


def stage(name: str, **changes: Any) -> dict[str, Any]:
    return {
        "name": name,
        "steps": 3,
        "batch": {"prompts": 4},
        "mixture": [{"data": "plans", "representation": "graph"}],
        **changes,
    }


def supervised(name: str, **changes: Any) -> dict[str, Any]:
    return stage(name, objective={"name": "sft"}, sampling={"samples_per_prompt": 1}, **changes)


def curriculum(*stages: dict[str, Any], **changes: Any) -> Curriculum:
    tables = {
        "model": {"tiny": {}},
        "data": {"plans": PLANS},
        "stage": list(stages),
        "eval": {"data": "plans", "representations": ["natural", "table"], "prompts": 5},
        **changes,
    }
    recipe = check_tables(tables, Recipe, where="test")
    text = TextCodec(word_tokenizer(["a"]), chat_template=False, stop_ids=[1])
    return Curriculum(recipe, text)


def group(prompt: Prompt, *rewards: float) -> Group:
    rollouts = tuple(
        Rollout(
            prompt_id=prompt.prompt_id,
            sample=i,
            token_ids=ONE_TOKEN,
            sampler_logprob=None,
            finish="stop",
            policy_version=0,
        )
        for i in range(len(rewards))
    )
    return Group(prompt=prompt, rollouts=rollouts, rewards=rewards, advantages=rewards)


def do_step(source: Curriculum, reward: float = 0.0) -> list[str]:
    """One step; the questions that were asked."""
    present = source.stage()
    assert present is not None
    prompts = source.take(present.batch.prompts)
    source.observe([group(p, reward, reward) for p in prompts])
    return [p.payload.question for p in prompts]


def evaluate(source: Curriculum, reward: float) -> str:
    request = source.pending_evaluation()
    assert request is not None
    record(source, request, [reward] * len(request.prompts))
    return request.label


def record(source: Curriculum, request: EvaluationRequest, rewards: list[float]) -> EvaluationRecord:
    return source.record_evaluation(request, answers(source, request, rewards), None)


def answers(source: Curriculum, request: EvaluationRequest, rewards: list[float]) -> Answers:
    size = len(rewards) // len(request.prompts)
    return Answers(
        texts=("",) * len(rewards),
        rewards=tuple(rewards),
        correct=tuple(source.is_correct(request.prompts[i // size], reward) for i, reward in enumerate(rewards)),
        found=tuple(reward > 0 for reward in rewards),
    )


def test_stages_follow_one_another_and_end_by_steps() -> None:
    source = curriculum(stage("one"), stage("two"))
    names = []
    while (present := source.stage()) is not None:
        names.append(present.name)
        do_step(source)
    assert names == ["one"] * 3 + ["two"] * 3
    assert source.finished == [
        {"name": "one", "steps": 3, "ended_by": "steps"},
        {"name": "two", "steps": 3, "ended_by": "steps"},
    ]


def test_mastery_needs_a_bound_above_its_rate_over_a_whole_window() -> None:
    source = curriculum(stage("one", steps=20, mastery={"pass_rate": 0.8, "window": 3, "min_steps": 2}))
    for reward in (0.0, 1.0, 1.0):
        do_step(source, reward)
    assert source.stage() is not None  # 8 of 12 groups
    do_step(source, 1.0)  # 12 of 12: 12 / (12 + 1.645^2) = 0.816
    assert source.stage() is None and source.finished[0] == {"name": "one", "steps": 4, "ended_by": "mastery"}


def test_a_plateau_ends_a_stage_that_no_longer_gains() -> None:
    end = {"window": 5, "min_gain": 0.1, "patience": 2, "min_steps": 1}
    source = curriculum(stage("one", steps=20, plateau=end))
    for reward in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6):
        do_step(source, reward)
    for _ in range(4):
        do_step(source, 0.6)
    assert source.stage() is not None  # 0.5 in the window before the last
    do_step(source, 0.6)
    assert source.stage() is None and source.finished[0] == {"name": "one", "steps": 11, "ended_by": "plateau"}


def test_the_tests_of_mastery_and_plateau_do_not_disturb_each_other() -> None:
    ends = {"mastery": {"pass_rate": 0.5, "window": 1, "min_steps": 1}, "plateau": {"window": 6, "min_steps": 1}}
    source = curriculum(stage("one", steps=20, **ends))
    for reward in (0.1, 0.2, 0.3, 0.4, 1.0):
        assert source.stage() is not None
        do_step(source, reward)
    assert source.finished[0]["ended_by"] == "mastery"


BOTH_SIDES = {
    "mixture": [{"data": "plans", "representation": "graph"}, {"data": "plans"}],
    "batch": {"prompts": 10},
}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"mastery": {"pass_rate": 1.0}}, "less than 1"),
        ({"plateau": {"window": 4}}, "greater than or equal to 5"),
        ({"plateau": {}}, "min_steps must be below steps"),
        ({"plateau": {"min_steps": 1}}, "window \\+ patience must be at most steps"),
        ({"mastery": {"pass_rate": 0.5, "min_steps": 1, "window": 20}}, "mastery.window must be below steps"),
        ({"adaptive": {"window": 5, "patience": 11}, **BOTH_SIDES}, "leave symbols before .* got 20, 1 and 20"),
        ({"fade": "cosine"}, "fade needs a weight_end"),
        ({"adaptive": {}}, "parts of the representation target and parts of others"),
    ],
)
def test_an_end_or_a_mixture_that_cannot_act_is_refused(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        curriculum(stage("one", steps=20, **changes))


def test_demonstrations_neither_master_nor_level_off() -> None:
    with pytest.raises(UserError, match="mastery is not supported with objective.name = 'sft'"):
        curriculum(supervised("one", mastery={"pass_rate": 0.5, "min_steps": 1}))


def test_a_budget_of_response_tokens_ends_each_stage_by_itself() -> None:
    source = curriculum(stage("one", steps=20, max_response_tok=17), stage("two", steps=20, max_response_tok=16))
    while source.stage() is not None:
        do_step(source)  # 4 prompts, 2 responses each, of one token
    assert source.finished == [
        {"name": "one", "steps": 3, "ended_by": "max_response_tok"},
        {"name": "two", "steps": 2, "ended_by": "max_response_tok"},
    ]


@pytest.mark.parametrize("end", [{"plateau": {"min_gain": -0.1}}, {"mastery": {"window": 0}}, {"max_response_tok": 0}])
def test_an_impossible_end_is_refused(end: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="greater than or equal to"):
        curriculum(stage("one", **end))


def test_there_is_one_evaluation_at_each_boundary() -> None:
    source = curriculum(supervised("warm-up"), stage("one"), stage("two"))
    labels = []
    while True:
        if source.pending_evaluation() is not None:
            labels.append(evaluate(source, 1.0))
            assert source.pending_evaluation() is None
        if source.stage() is None:
            break
        do_step(source)
    assert labels == ["warm-up", "one", "two"]


def test_without_a_warm_up_the_first_evaluation_comes_before_the_first_step() -> None:
    source = curriculum(stage("one"))
    assert evaluate(source, 0.0) == "start"
    for _ in range(3):
        do_step(source)
    evaluate(source, 1.0)
    accuracy = source.evaluations.accuracy()
    assert accuracy["before"]["natural"]["rate"] == 0 and accuracy["after"]["table"]["rate"] == 1


def test_before_means_after_the_last_leading_supervised_stage() -> None:
    source = curriculum(supervised("warm-up"), supervised("more"), stage("one"))
    for reward in (0.2, 0.4, 1.0):
        for _ in range(3):
            do_step(source)
        evaluate(source, float(reward > 0.3))
    assert source.evaluations.accuracy()["before"]["natural"]["rate"] == 1.0  # of "more", not of "warm-up"


def test_training_and_evaluation_never_share_a_procedure() -> None:
    source = curriculum(stage("one", steps=100))
    trained = set()
    for _ in range(100):
        present = source.stage()
        assert present is not None
        prompts = source.take(present.batch.prompts)
        trained |= {p.payload.key for p in prompts}
        source.observe([group(p, 0.0, 1.0) for p in prompts])
    request = source.pending_evaluation()
    assert request is not None
    assert trained.isdisjoint(p.payload.key for p in request.prompts)
    by_representation: dict[str, list[str]] = {}
    for prompt in request.prompts:
        by_representation.setdefault(prompt.representation, []).append(prompt.payload.key)
    assert by_representation["natural"] == by_representation["table"]  # the same procedures in every form


def test_a_restored_curriculum_asks_what_the_first_one_would_have_asked() -> None:
    ends = {
        "mastery": {"pass_rate": 0.9, "window": 2, "min_steps": 1},
        "plateau": {"window": 5, "patience": 1, "min_steps": 1, "min_gain": 1},
        "max_response_tok": 99,
    }
    stages = (stage("one", steps=7, **ends), stage("two"))
    first, second = curriculum(*stages), curriculum(*stages)
    evaluate(first, 0.0)
    do_step(first, 0.4)
    do_step(first, 0.5)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for _ in range(5):
        assert do_step(first, 0.5) == do_step(second, 0.5)
    assert first.state_dict() == second.state_dict() and first.finished[0]["ended_by"] == "plateau"


def test_a_state_that_does_not_fit_the_recipe_is_refused() -> None:
    state = curriculum(stage("one")).state_dict()
    older = {key: value for key, value in state.items() if key != "response_tok"}
    for unfit in (older, {**state, "stage_index": 2}):
        with pytest.raises(UserError, match="resume with the recipe and the version that wrote it"):
            curriculum(stage("one")).load_state_dict(unfit)


def test_another_seed_asks_other_questions() -> None:
    one, two = (curriculum(stage("one"), run={"seed": seed}) for seed in (0, 1))
    assert do_step(one) != do_step(two)


def test_the_sequential_baseline_counts_chains_whose_answer_is_right() -> None:
    source = curriculum(stage("one"))
    request = source.pending_evaluation()
    assert request is not None
    right = [p.payload.sequential_answer == p.payload.answer for p in request.prompts if p.representation == "natural"]
    assert source.evaluations.sequential_baseline()["natural"] == sum(right) / len(right)


@pytest.mark.parametrize("path", sorted(RECIPES.rglob("*.toml")), ids=lambda p: str(p.relative_to(RECIPES)))
def test_every_recipe_is_valid(path: Path) -> None:
    if path.stem.endswith("base"):
        with pytest.raises(UserError, match="stage: must be given"):
            load_recipe(path, [], Recipe)
        return
    recipe = load_recipe(path, [], Recipe)
    assert recipe.stage


def test_an_evaluation_counts_right_answers_not_partial_rewards() -> None:
    source = curriculum(stage("one"))
    request = source.pending_evaluation()
    assert request is not None
    record(source, request, [1.0 if i % 2 else 0.9 for i in range(len(request.prompts))])
    counted = source.evaluations.done[0]["accuracy"].values()
    assert sum(result["correct"] for result in counted) == len(request.prompts) // 2


def test_a_row_of_a_large_file_is_chosen_as_fast_as_one_of_a_small_file(tmp_path: Path) -> None:
    """Each pass in an order of its own, as ever; and made once a pass, not once a row."""
    num_rows = 60_000
    lines = (json.dumps({"question": f"{n} + 1", "answer": str(n + 1)}) for n in range(num_rows))
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    data = JsonlData(kind="jsonl", family="math", files={"text": str(tmp_path / "rows.jsonl")}, eval_share=0.5)
    files = TaskFiles(data, TextCodec(word_tokenizer(["a"]), chat_template=False, stop_ids=[1]))
    tasks = files.training["text"]
    started = time.perf_counter()
    drawn = [files.draw("text", position, 7) for position in range(2 * len(tasks))]
    two_passes = [task.answer for task, _ in drawn]
    assert [after for _, after in drawn] == list(range(1, 2 * len(tasks) + 1))
    assert time.perf_counter() - started < 30  # 30,000 permutations of 30,000 rows take a quarter of an hour
    for turn, asked in enumerate((two_passes[: len(tasks)], two_passes[len(tasks) :])):
        order = random.Random(f"7:text:{turn}").sample(range(len(tasks)), len(tasks))
        assert asked == [tasks[i].answer for i in order]
