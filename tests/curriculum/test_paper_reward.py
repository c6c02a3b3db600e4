"""The paper's reward: what the authors' functions (fangru-lin/procedure_generalization_llm at f7adbe5) gave when run.

Every worth below was printed by their code; none was thought out. All quirks are among them: what is odd is theirs.
"""

import json
import time
from pathlib import Path

import pytest

from isomorph.curriculum.judge import judge
from isomorph.curriculum.recipe import JsonlData, Recipe
from isomorph.curriculum.rewards.families import check_reward
from isomorph.curriculum.rewards.pool import RewardPool
from isomorph.curriculum.stage import Curriculum
from isomorph.engine.config import UserError
from isomorph.engine.model.text import TextCodec, word_tokenizer
from isomorph.engine.recipe_file import check_tables, load_recipe

NONE = None  # of the texts below none is worth that
# Accepted answer: (what is worth 1, what is worth 0), texts with ¦ between them.
PLANS = {
    "[datetime.timedelta(seconds=4800), datetime.timedelta(seconds=4800)]": (
        (
            "80 min¦80 minutes¦80 mins¦80 MIN¦80\n minutes¦1 hour 20 min¦1 hour and 20 minutes¦1 hour, 20 minutes¦"
            "1 h 20 min¦4800 sec¦4800 seconds¦4,800 sec¦5-80 min¦-80 min¦20 + 80 min¦20 min + 60 min¦= 80 min¦"
            "7 min = 80 min¦5 min or 80 min¦5 or or 80 min¦80 min (7 min)¦about 80 min, I think¦80 minor things¦"
            r"80 min 2 cats¦1,0080 min¦80.0 min¦step 3: 80 min¦step3: 80 min¦８０ min¦80 min¦**80 min**¦\boxed{80 min}¦"
            "1.3333333333 hours¦60 min and 0.3333333333333 hours"
        ),
        (
            "80min¦80-minute¦1 hr 20 min¦1h20min¦1h 20min¦1 h 20 m¦4800 s¦48,00 sec¦eighty minutes¦half an hour¦"
            "80-5 min¦5 to 80 min¦goes to 80 min¦20 + 60 min¦80 min = 7¦80 min or 5 min¦(80 min)¦80 min. 3 steps¦"
            "80 min in 3 steps¦80 min of 2 dogs¦1.5,080 min¦80.00000001 min¦80.0000001 sec¦1e400 min¦80 xmin¦80¦80.0¦"
            "¦0.0019 months¦80 m¦1.333 hours"
        ),
    ),
    "[datetime.timedelta(seconds=5400), datetime.timedelta(seconds=5400)]": (
        (
            "an hour and a half¦1 hour and a half¦one hour and a half¦1.5 hours¦a hour and a half¦"
            "takes an hour and a half"
        ),
        (
            "one and a half hours¦1 and a half hours¦90 min and a half¦forty-five minutes and a half hour and a half¦"
            "hour and a half¦1.5h¦1 1/2 hours¦takes a hour and a half¦zero and a half hours¦half and a half hours¦"
            "two and a half hours¦half a day and a half"
        ),
    ),
    "[datetime.timedelta(seconds=10800), datetime.timedelta(seconds=10800)]": (
        "3 hippos¦3 hours¦3 h¦3 hou¦180 min¦180 minuten",
        "3 hrs¦three hours¦3h¦180 mi",
    ),
    "[datetime.timedelta(seconds=216000), datetime.timedelta(seconds=216000)]": (
        "2 days and a half¦2.5 d¦2.5 days¦2 d 12 h¦2 doors 12 h¦60 hours¦two days and a half day",
        "two and a half days¦2 and a half days¦two and a half days and one hour and a half",
    ),
    "[datetime.timedelta(seconds=3931200), datetime.timedelta(seconds=3931200)]": (
        "45.5 days¦6.5 weeks¦6.5 w¦6.5 wk",
        "forty-five and a half days¦forty five and a half days¦1.5 months¦one-hundred and a half days",
    ),
    "[datetime.timedelta(seconds=8683200), datetime.timedelta(seconds=8683200)]": (
        NONE,
        "one-hundred and a half days¦a hundred and a half days¦hundred and a half days¦a-hundred and a half days",
    ),
    "[datetime.timedelta(seconds=2419200), datetime.timedelta(seconds=2678400)]": (
        "1 month¦1 m¦1 mo¦1 months¦30 days¦4 weeks¦4.4 weeks¦1.1 months¦0.91 months¦1 matches¦672 h¦1 month 1 day",
        "a month¦one month¦27 days¦32 days¦0.9 months¦671 h¦month 1",
    ),
    "[datetime.timedelta(seconds=31536000), datetime.timedelta(seconds=31536000)]": (
        "1 year¦1 yearling¦52 weeks 1 day¦365 days",
        "1 y¦12 months¦13 months¦366 days¦11.8 months¦14 m",
    ),
    "[datetime.timedelta(seconds=0), datetime.timedelta(seconds=0)]": (
        "0 min¦nothing¦0¦5 xyz",
        "5 hr¦0 s¦1 min",
    ),
    "[datetime.timedelta(seconds=60), datetime.timedelta(seconds=7200)]": (
        "1 min¦2 hours¦1 hour¦30 sec 30 sec¦1-2 hours",
        "121 min¦59 sec¦1 min to 2 min",
    ),
    "518400.0": (
        "518400¦518400.0¦5.184e5¦518_400¦\uff1518400¦+518400¦ 518400\n¦518400.0000000000001",
        "518,400¦518400 s¦-518400¦6 days¦= 518400¦inf¦nan",
    ),
    "4.66": (
        "4.66¦4.660¦0466e-2",
        "4.67",
    ),
    "80 min": (
        "80 min¦80 MIN",
        "80 minutes¦80  min¦4800 sec",
    ),
    "80 MIN": (
        NONE,
        "80 MIN¦80 min",
    ),
}

PLAN_RESPONSES = {
    "[datetime.timedelta(seconds=4800), datetime.timedelta(seconds=4800)]": (
        (
            "<answer>7 min</answer><answer>80 min</answer>¦<answer>80 min</answer></answer>¦"
            "</answer><answer>80 min</answer>¦<answer>80 min</answer><answer>7 min¦<answer> \n80 min\n</answer> bye"
        ),
        (
            "80 min¦<answer>80 min¦80 min</answer>¦<answer>80 min</answer><answer>7 min</answer>¦"
            "<answer>80 min <answer>7 min</answer>¦<answer>7 min <answer>80 min</answer>¦<Answer>80 min</Answer>¦"
            r"<answer>80 min</answer><answer> </answer>¦\boxed{80 min}"
        ),
    ),
}

FORMULAS = {
    r"\frac{1}{2}": (
        (
            r"\frac{1}{2}¦\dfrac{1}{2}¦\tfrac12¦\frac12¦\frac1{2}¦1/2¦ 1 / 2¦0.5¦.5¦x=1/2¦x = 0.5¦ab=1/2¦"
            r"$\frac{1}{2}$¦so $1/2$¦\left\frac{1}{2}\right¦1/2\%¦1/2^\circ¦1/2^{\circ}¦\$1/2¦1/2\text{ cm}¦"
            "\\\\frac{1}{2}¦\\frac{1}{2}\\!¦\\frac{1}{ 2}¦\\frac{1}\n{2}"
        ),
        (
            r"\frac{1}2¦01/2¦1/2.¦2/4¦0.50¦abc=1/2¦x=y=1/2¦1/2 = x¦$ $1/2$ $¦a $1$ b $1/2$¦\boxed{1/2}¦1/2%¦"
            r"1/2\text{cm}¦1/2\text{ a}\text{ b}¦\frac¦\frac1¦-\frac{1}{2}¦-1/2¦½¦1_0/20"
        ),
    ),
    "12": (
        r"12¦1 2¦12\text{ cm}¦x=12¦$12$¦1\!2",
        r"12.0¦12 cm¦$12¦(12)¦+12¦12.¦12\sqrt¦{12}¦\text{ 12}¦１２",
    ),
    r"\sqrt{2}": (
        r"\sqrt{2}¦\sqrt2¦\sqrt{ 2}",
        r"\sqrt 2¦sqrt(2)¦1\sqrt2¦\sqrt",
    ),
    "B": (
        NONE,
        r"B¦b¦\text{B}",
    ),
    "b": (
        "B¦b",
        "(b)",
    ),
    r"\text{Monday}": (
        NONE,
        r"Monday¦\text{Monday}¦\text{monday}",
    ),
    r"\frac": (
        r"\frac¦\FRAC",
        "frac",
    ),
    r"3 \text{ cm}": (
        r"3¦3\text{ m}",
        r"3 cm¦3\text{cm}",
    ),
    "a/b": (
        "a/b¦A/B¦ a/b",
        r"\frac{a}{b}",
    ),
    "{.5}": (
        "{.5}¦{0.5}",
        ".5",
    ),
    "1 .5": (
        "1 .5¦1 0.5¦10.5",
        "1.5",
    ),
    "": (
        r"¦$$¦\!",
        "$¦0",
    ),
    "Interval(-1, oo)": (
        NONE,
        "Interval(-1, oo)¦interval(-1, oo)",
    ),
}

FORMULA_RESPONSES = {
    "5": (
        "<answer>4</answer><answer>5</answer>¦<answer>5</answer>",
        r"\boxed{5}¦5¦<answer>5</answer><answer>4</answer>¦<answer>5 <answer>4</answer>¦<answer>5",
    ),
}


@pytest.mark.parametrize(
    ("family", "table", "wrapped"),
    [
        ("async_plan", PLANS, "so it is <answer>{}</answer>"),
        ("async_plan", PLAN_RESPONSES, "{}"),
        ("math", FORMULAS, "so it is <answer>{}</answer>"),
        ("math", FORMULA_RESPONSES, "{}"),
    ],
)
def test_every_worth_is_what_the_authors_function_gave(
    family: str, table: dict[str, tuple[str | None, str | None]], wrapped: str
) -> None:
    wrong = [
        (text, gold)
        for gold, sides in table.items()
        for worth, texts in zip((1.0, 0.0), sides, strict=True)
        for text in (() if texts is None else texts.split("¦"))
        if judge(family, wrapped.replace("{}", text), gold, reward="paper") != worth
    ]
    assert wrong == []


@pytest.mark.parametrize(
    "text",
    [
        "1" + ",000" * 12_000,  # a number that could begin at each of its commas
        "1." * 25_000,
        "9" * 50_000,
        "a " * 24_000 + "one and a half days",  # the authors' way copies the text once a word
        "a" * 40_000 + "_ one and a half days",  # exponential in the authors' pattern
        "a-" * 20_000 + "_ one and a half days",
        "1 " * 25_000,
        "1" + " " * 49_000,
        " or" * 16_000,
        "\\frac" * 10_000,
        "x" * 3_000_000,
    ],
)
def test_the_papers_reward_takes_no_time_for_hostile_answers(text: str) -> None:
    start = time.process_time()
    for response in (f"<answer>{text}</answer>", "<answer>" * 50_000 + text, "</answer>" * 50_000 + text):
        for family, gold in (("async_plan", next(iter(PLANS))), ("async_plan", "80.0"), ("math", "12")):
            assert judge(family, response, gold, reward="paper") == 0.0
    assert time.process_time() - start < 5.0


def _recipe(data: dict[str, object], representation: str = "natural") -> Recipe:
    tables = {
        "model": {"tiny": {}},
        "data": {"rows": data},
        "stage": [{"name": "one", "steps": 1, "mixture": [{"data": "rows", "representation": representation}]}],
        "eval": {"data": "rows", "representations": [representation]},
    }
    return check_tables(tables, Recipe, where="test")


def test_a_recipe_names_its_reward_and_a_wrong_name_is_refused() -> None:
    rows = {"kind": "jsonl", "family": "math", "files": {"natural": "x"}}
    assert _recipe(rows).data["rows"].reward == "strict"
    assert _recipe({**rows, "reward": "paper"}).data["rows"].reward == "paper"
    for refused, named in (
        ({**rows, "reward": "lenient"}, "'strict' or 'paper'"),
        ({**rows, "family": "physics", "reward": "paper"}, "physics has no reward"),
        ({"kind": "async_plan", "reward": "paper"}, "generated tasks need"),
    ):
        with pytest.raises(UserError, match=named):
            _recipe(refused)
    with pytest.raises(ValueError, match="reward must be one of"):
        check_reward("math", "lenient")
    with pytest.raises(ValueError, match="physics has no reward"):
        judge("physics", "<answer>5 m</answer>", "5 m", reward="paper")


RECIPES = Path(__file__).parents[2] / "curriculum" / "recipes" / "paper"


@pytest.mark.parametrize("name", sorted(p.name for p in RECIPES.glob("*.toml") if not p.stem.endswith("base")))
def test_the_papers_conditions_are_judged_by_its_reward(name: str) -> None:
    """But for physics, which has no such reward, and for a teacher's answers, which are rows."""
    recipe = load_recipe(RECIPES / name, [], Recipe)
    found = {data.reward for data in recipe.data.values() if isinstance(data, JsonlData)}
    assert found == {"strict" if name.startswith("physics") else "paper"}


def test_the_reward_of_a_recipe_reaches_the_judge(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"question": f"{n}?", "answer": "0.5"}) + "\n" for n in range(12)))
    for reward, worth in (("strict", [1.0, 0.0]), ("paper", [0.0, 1.0])):
        recipe = _recipe({"kind": "jsonl", "family": "math", "files": {"natural": str(rows)}, "reward": reward})
        text = TextCodec(word_tokenizer(["?"]), chat_template=False, stop_ids=[1])
        prompts = Curriculum(recipe, text).take(2)
        with RewardPool(max_workers=1, deadline_s=60.0) as judges:
            assert judges(prompts, ["<answer>0.50</answer>", r"<answer>1/2\%</answer>"]) == worth
