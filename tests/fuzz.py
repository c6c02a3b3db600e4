"""Wrong input by the thousand: recipes, overrides, rows, answers, checkpoints, run folders, model folders.

    python tests/fuzz.py --cases 10000 --seed 1             all families
    python tests/fuzz.py --family recipes --only 17          one case again, with its traceback

A case is accepted, or refused by the errors that the command line turns into one ``error:`` line and exit code 2. Any
other exception is a traceback, and more than DEADLINE_S seconds are a hang: both are counted, shown, and end this
command with 1. Case i of a family depends on the seed and i alone.
"""

import argparse
import contextlib
import copy
import json
import random
import signal
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from isomorph.curriculum.inputs import located
from isomorph.curriculum.recipe import Recipe
from isomorph.curriculum.report.run_record import read_completions, read_run, series
from isomorph.curriculum.rewards import builtin
from isomorph.curriculum.rewards.answer import Answer
from isomorph.curriculum.rows.dataset import Side
from isomorph.curriculum.rows.spec import RowsData
from isomorph.curriculum.rows.table import training_rows
from isomorph.curriculum.tasks.task import DataError
from isomorph.engine.config import ModelConfig, TinyModel, UserError
from isomorph.engine.model.load import build_tiny, load_policy
from isomorph.engine.recipe_file import check_tables, load_recipe, read_tables
from isomorph.engine.record.checkpoint import load_checkpoint, save_checkpoint
from isomorph.engine.types import RunState

DEADLINE_S = 20.0
RECIPES = Path(__file__).parents[1] / "curriculum" / "recipes"
Json = Any


class Hang(BaseException):
    """Raised by the alarm; no Exception, which a library might catch."""


def raise_hang(number: int, frame: Any) -> None:
    raise Hang


TEXTS = [
    "",
    " ",
    "a",
    "0",
    "true",
    "nan",
    "../x",
    "a/b",
    "\0",
    "é",
    "\u202e",
    "💥",
    "{",
    "}",
    "{x}",
    "{{",
    "[",
    "'",
    '"',
]
TEXTS += ["a" * 5000, "$HOME", "$NOPE", "~", "~nobody/x", "hub:", "hub:@", "x.py:f", "x:y", ":", "%s", "\x1b[2J", "\n"]
TEXTS += [
    "sft",
    "natural",
    "words",
    "async_plan",
    "rows",
    "jsonl",
    "off",
    "vllm",
    "fsdp",
    "linear",
    "adaptive",
    "__x__",
]
NUMBERS = [0, -1, 1, 2, 3, 7, 100, 2**31, 2**63, -(2**63), 10**30, 0.0, -0.0, 0.5, 1.5, -1.5, 1e308, 5e-324]
NUMBERS += [10**400, float("nan"), float("inf"), float("-inf")]


def any_value(rng: random.Random, depth: int = 0) -> Json:
    """A value of any TOML or JSON type."""
    kind = rng.randrange(6 if depth < 3 else 3)
    if kind == 0:
        return rng.choice(TEXTS)
    if kind == 1:
        return rng.choice(NUMBERS)
    if kind == 2:
        return rng.choice([True, False])
    if kind == 3:
        return [any_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    keys = rng.sample(["name", "kind", "data", "steps", "x", "function", "path", ""], rng.randrange(4))
    return {key: any_value(rng, depth + 1) for key in keys}


def places(value: Json, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all values inside."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*at, key)
        yield from places(inner, (*at, key))


def value_at(value: Json, place: tuple[Any, ...]) -> Json:
    for key in place:
        value = value[key]
    return value


def near(value: Json, rng: random.Random) -> Json:
    """Another value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, str):
        return rng.choice([value, value + "x", *TEXTS])
    return rng.choice([value * 2, value + 1, max(1, value - 1), value / 2, *NUMBERS])


def mutated(value: Json, rng: random.Random, keys: list[str]) -> Json:
    """``value`` with one to three values replaced, removed, doubled, or added under one of ``keys``."""
    changed = copy.deepcopy(value)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        found = list(places(changed))
        if not found:
            return changed
        *parents, last = rng.choice(found)
        node = changed
        for key in parents:
            node = node[key]
        what = rng.randrange(5)
        if what == 0:
            del node[last]
        elif what == 1 and isinstance(node, dict):
            node[rng.choice(keys)] = any_value(rng)
        elif what == 2 and isinstance(node, list):
            node.append(copy.deepcopy(node[last]))
        elif what == 3 and isinstance(node[last], dict):
            node[last][rng.choice(keys)] = any_value(rng)
        else:
            node[last] = any_value(rng)
    return changed


def toml(value: Json) -> str:
    """``value`` as an inline TOML value; JSON's strings are TOML's, but for lone surrogates and DEL."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {toml(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(toml, value)) + "]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return str(value).lower() if isinstance(value, bool | float) else str(value)


def as_recipe(tables: Json) -> str:
    return "".join(f"{json.dumps(key)} = {toml(value)}\n" for key, value in tables.items())


def damaged(content: bytes, rng: random.Random) -> bytes:
    """With flipped bits, cut off, or a part replaced."""
    data = bytearray(content)
    what = rng.randrange(4)
    if what == 0 and data:
        for _ in range(rng.choice([1, 1, 8])):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif what == 1:
        del data[rng.randrange(len(data) + 1) :]
    elif what == 2:
        at = rng.randrange(len(data) + 1)
        data[at : at + rng.randrange(64)] = rng.randbytes(rng.randrange(64))
    else:
        data[:] = rng.choice(
            [b"", b"null", b"[]", b"{}", b"\xff\xfe", b"[" * 100_000, b"\x80\x04.", b"PK\x03\x04", b"1e999"]
        )
    return bytes(data)


def schema_keys(schema: Json) -> list[str]:
    """All keys that the schema of a recipe knows."""
    found = {key for part in schema.get("$defs", {}).values() for key in part.get("properties", {})}
    return sorted(found | schema["properties"].keys())


class Fuzz:
    """The families; ``folder`` is for their files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        names = ["smoke", "quickstart", "exam", "conditions/adaptive", "conditions/fading"]
        self.recipes = [read_tables(RECIPES / f"{name}.toml") for name in names]
        rows = {"kind": "rows", "path": "rows.jsonl", "prompt": "q", "answer": "a", "rewards": [{"function": "exact"}]}
        gym = {"kind": "reasoning_gym", "tasks": {"countdown": {"min_numbers": 3}}}
        jsonl = {"kind": "jsonl", "family": "math", "files": {"natural": "x.jsonl"}}
        for data in (rows, gym, jsonl):
            form = "countdown" if data is gym else "natural"
            stage = {"name": "s", "steps": 3, "mixture": [{"data": "d", "representation": form}], "optim": {"lr": 1e-4}}
            model = {"tiny": {"tokenizer": "bytes"}}
            self.recipes.append({"model": model, "data": {"d": data}, "stage": [stage], "eval": {"data": "d"}})
        self.keys = schema_keys(Recipe.model_json_schema())
        self.seconds = DEADLINE_S
        self._made: dict[str, Path] = {}

    # -- recipes
    def recipes_(self, rng: random.Random) -> None:
        tables = mutated(rng.choice(self.recipes), rng, self.keys)
        text = as_recipe(tables).encode("utf-8", "surrogatepass")
        if rng.random() < 0.1:
            text = damaged(text, rng)
        path = self.folder / "recipe.toml"
        path.write_bytes(text)
        located(load_recipe(path, [], Recipe))

    def overrides(self, rng: random.Random) -> None:
        tables = rng.choice(self.recipes)
        found = [".".join(map(str, place)) for place in places(tables)] + self.keys
        key = rng.choice(found)
        if rng.random() < 0.4:  # another value of the type that stands there
            at = rng.choice([place for place in places(tables) if not isinstance(value_at(tables, place), dict | list)])
            load_recipe(
                self._written(tables), [f"{'.'.join(map(str, at))}={toml(near(value_at(tables, at), rng))}"], Recipe
            )
            return
        if rng.random() < 0.2:
            key = rng.choice(TEXTS) + rng.choice([".", "", "..", "="]) + key
        value = rng.choice([toml(any_value(rng)), rng.choice(TEXTS), ""])
        texts = [rng.choice([f"{key}={value}", f"{key}.{rng.choice(self.keys)}={value}", key, f"={value}"])]
        load_recipe(self._written(tables), texts, Recipe)

    def _written(self, tables: Json) -> Path:
        path = self.folder / "recipe.toml"
        path.write_text(as_recipe(tables))
        return path

    # -- rows
    def rows(self, rng: random.Random) -> None:
        keys = ["q", "a", "label", "messages", "x.y", ""]
        chat = [{"role": "user", "content": "c"}]
        rows = [{"q": f"what is {i}?", "a": str(i), "label": "l", "messages": chat} for i in range(4)]
        changed = rng.randrange(4)
        rows[changed] = mutated(rows[changed], rng, keys)
        suffix = rng.choice([".jsonl", ".jsonl", ".json", ".csv", ".parquet", ".arrow"])
        content = "\n".join(map(json.dumps, rows))
        if suffix == ".json":
            content = json.dumps(rows)
        elif suffix == ".csv":
            content = "q,a\n" + "\n".join(f"{row.get('q')},{row.get('a')}" for row in rows)
        path = self.folder / f"rows{suffix}"
        is_damaged = rng.random() < 0.3 or suffix in (".parquet", ".arrow")
        data = content.encode("utf-8", "surrogatepass")
        path.write_bytes(damaged(data, rng) if is_damaged else data)
        given = {"kind": "rows", "path": str(path)}
        given["prompt"] = rng.choice(["q", "q", "messages", "{q} {a}", "{x.y}", "{q", "{}"])
        given["answer"] = rng.choice(["a", "a", "q", "{a}", "messages", "nothing"])
        given |= rng.choice([{}, {}, {"representation_column": "label"}, {"demonstration": "a"}, {"system": "{q}"}])
        table = check_tables(given, RowsData, where="rows")
        side = Side(training_rows(table), table, "rows")
        for i in range(len(side.rows)):
            side.task(i)

    # -- answers
    def answers(self, rng: random.Random) -> None:
        parts = [
            *TEXTS,
            "<answer>",
            "</answer>",
            "\\boxed{",
            "}",
            "####",
            "1/2",
            "10^{9}",
            "5 min",
            "2 hours",
            "\\frac",
        ]
        parts += ["3.5e5", "1,000", "(", ")", "m/s", "x^2", "__import__('os')", "\ud800", "9" * 400, "1e400", "٣", "½"]

        def text() -> str:
            return "".join(rng.choice(parts) for _ in range(rng.randint(0, 12)))

        answer = Answer(
            prompt="?", text=rng.choice(["{}", "<answer>{}</answer>", "\\boxed{{{}}}"]).format(text()), gold=text()
        )
        names = ("exact", "numeric", "choice", "formatted", "async_plan", "math_sympy", "physics")
        name = rng.choice(names)
        if name in ("async_plan", "math_sympy", "physics"):
            answer = Answer(
                prompt="?",
                text=answer.text,
                gold=rng.choice(["5 min", "80 min"] if name == "async_plan" else ["5", "5 m"]),
            )
        reward = getattr(builtin, name)(answer)
        if reward is not None and not 0 <= reward <= 1:
            raise AssertionError(f"{name} must be in 0..1, got {reward}")

    # -- files that a run writes
    def checkpoints(self, rng: random.Random) -> None:
        folder = self._made.get("checkpoint")
        if folder is None:
            source = {"stage_index": 0, "exams": []}
            state = RunState(step=3, stage="s", source=source, totals={"wall_s": 1.0})
            tensors = {"a": torch.ones(3, 2), "b": torch.zeros(5)}
            folder = self._made["checkpoint"] = save_checkpoint(
                self.folder / "checkpoints", state, tensors, tensors, keep=1
            )
        self._with_damage(folder, rng, lambda: load_checkpoint(folder))

    def runs(self, rng: random.Random) -> None:
        folder = self._made.get("run")
        if folder is None:
            folder = self._made["run"] = _small_run(self.folder / "run")

        def read() -> None:
            record = read_run(folder)
            for key in ("loss", "reward/mean", "time/step_s"):
                series(record.rows, key)
            read_completions(folder / "completions" / "step-00000001.jsonl")

        self._with_damage(folder, rng, read)

    def models(self, rng: random.Random) -> None:
        folder = self._made.get("model")
        if folder is None:
            folder = self._made["model"] = self.folder / "model"
            tiny = TinyModel(hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1, intermediate_size=16)
            build_tiny(tiny, ["a", "b"], seed=0, dtype=torch.float32, device=torch.device("cpu")).save(folder)
        config = ModelConfig(path=str(folder))
        self._with_damage(folder, rng, lambda: load_policy(config, vocabulary=[], seed=0, device=torch.device("cpu")))

    def _with_damage(self, folder: Path, rng: random.Random, read: Callable[[], object]) -> None:
        file = rng.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
        before = file.read_bytes()
        if file.suffix == ".json" and rng.random() < 0.7:
            value = json.loads(before)
            file.write_text(json.dumps(mutated(value, rng, sorted({str(place[-1]) for place in places(value)}))))
        elif file.suffix == ".jsonl" and rng.random() < 0.7:
            rows = [json.loads(line) for line in before.splitlines()]
            file.write_text("".join(json.dumps(mutated(row, rng, list(row))) + "\n" for row in rows))
        else:
            file.write_bytes(damaged(before, rng))
        try:
            read()
        finally:
            file.write_bytes(before)


def _small_run(folder: Path) -> Path:
    (folder / "completions").mkdir(parents=True)
    recipe = load_recipe(RECIPES / "smoke.toml", [], Recipe)
    machine = {"gpus": [], "cores": 2, "cpu_capability": "AVX2", "memory_gib": 1.0, "threads": 1}
    described = {
        "recipe": recipe.model_dump(mode="json"),
        "model": {"type": "llama", "parameters": 1, "dtype": "float32"},
    }
    described |= {"machine": machine, "sampler": "builtin", "seed": 0, "versions": {"torch": "2"}}
    stage = recipe.stage[0].name
    rows = [
        {"step": i, "stage": stage, "time/step_s": 1.0, "loss": 0.5, "reward/mean": None, "wall_s": i} for i in (1, 2)
    ]
    answer = {"representation": "natural", "text": "5", "prompt": "?", "reward": 1.0, "correct": True, "answered": True}
    ended = [{"name": stage, "ended_by": "steps"}]
    summary = {
        "status": "done",
        "stages": ended,
        "weights_sha256": "0",
        "best": None,
        "floor": {"natural": 0.5},
        "shortcuts": {},
    }
    (folder / "run.json").write_text(json.dumps(described))
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "steps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("step-00000001", f"exam-{stage}"):
        (folder / "completions" / f"{name}.jsonl").write_text(json.dumps({**answer, "sample": None}) + "\n")
    return folder


SHARES = {
    "recipes": 45,
    "overrides": 25,
    "rows": 12,
    "answers": 10,
    "checkpoints": 4,
    "runs": 3,
    "models": 1,
}  # percent


def method(fuzz: Fuzz, family: str) -> Callable[[random.Random], None]:
    return fuzz.recipes_ if family == "recipes" else getattr(fuzz, family)


def one_case(run: Callable[[random.Random], None], seed: str) -> tuple[str, str]:
    """Whether the case was accepted, refused, a traceback or a hang; and the traceback."""
    signal.setitimer(signal.ITIMER_REAL, DEADLINE_S)
    try:
        run(random.Random(seed))
    except (UserError, DataError) as error:
        return ("refused", "") if str(error).strip() else ("traceback", "an error without a sentence")
    except Hang:
        return "hang", traceback.format_exc()
    except Exception:
        return "traceback", traceback.format_exc()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return "accepted", ""


def fuzz(num_cases: int, seed: int, families: list[str]) -> tuple[dict[str, Counter[str]], dict[str, str]]:
    """Counts of each family, and what went wrong: the first case of each last line of a traceback."""
    counts: dict[str, Counter[str]] = {}
    wrong: dict[str, str] = {}
    before = signal.signal(signal.SIGALRM, raise_hang)
    shares = {name: SHARES[name] for name in families}
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder, quiet():
        made = Fuzz(Path(folder))
        for family, share in shares.items():
            counts[family] = Counter()
            for i in range(max(1, round(num_cases * share / sum(shares.values())))):
                outcome, why = one_case(method(made, family), f"{seed}-{family}-{i}")
                counts[family][outcome] += 1
                if why:
                    wrong.setdefault(f"{family}: {' | '.join(why.strip().splitlines()[-3:])}"[:400], f"case {i}\n{why}")
    signal.signal(signal.SIGALRM, before)
    return counts, wrong


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings of libraries about the files they read."""
    import transformers

    level = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.utils.logging.set_verbosity(level)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--family", choices=SHARES, action="append")
    parser.add_argument("--only", type=int, help="one case of one --family again")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.only is not None:
        signal.signal(signal.SIGALRM, raise_hang)
        with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
            (family,) = args.family
            print(*one_case(method(Fuzz(Path(folder)), family), f"{args.seed}-{family}-{args.only}"))
        return 0
    counts, wrong = fuzz(args.cases, args.seed, args.family or list(SHARES))
    columns = ("accepted", "refused", "traceback", "hang")
    print(f"{'family':12}{'cases':>8}" + "".join(f"{name:>11}" for name in columns))
    for family, found in counts.items():
        print(f"{family:12}{found.total():8}" + "".join(f"{found[name]:11}" for name in columns))
    for where, what in wrong.items():
        print(f"\n{where}\n{what}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
