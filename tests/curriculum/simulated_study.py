"""Rows of a study that was never run: right answers drawn with known probabilities."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

WARM_S, TOKENS_A_STEP = 30.0, 5_000


def write_study(
    folder: Path,
    effects: Mapping[str, float],
    *,
    seeds: Sequence[int] = (1, 2, 3, 4, 5, 6),
    budgets: Sequence[int] = (20, 40, 80),
    num_items: int = 300,
    spread: float = 0.06,
    representations: Sequence[str] = ("natural", "graph", "code"),
) -> None:
    """``effects``: condition -> accuracy above the first one's at the first budget; it halves at each further one."""
    rng = np.random.default_rng(3)
    folder.mkdir(parents=True, exist_ok=True)
    names = list(effects)
    keys = [f"k{i}" for i in range(num_items)]
    steps = rng.integers(4, 9, num_items)
    difficulty = np.clip(rng.normal(0, 0.12, num_items) - 0.06 * (steps - 6), -0.3, 0.3)
    curve = dict(zip((0, *budgets), np.linspace(0.2, 0.6, len(budgets) + 1) ** 0.8, strict=True))
    study = {
        "name": "simulated",
        "question": "Does graph -> words beat words only at equal budget?",
        "recipe": "base.toml",
        "seeds": list(seeds),
        "budgets": list(budgets),
        "test_budgets": list(budgets),
        "max_response_tok": None,
        "baseline": names[0],
        "measure": [representations[0]],
        "reach": [],
        "unequal": False,
        "conditions": {name: f"as {name} says ({budgets[-1]} steps)" for name in names},
        "contrasts": [[name, names[0]] for name in names[1:]],
        "warm_start": "sft graph+natural (500 steps), once per seed, shared by all conditions",
        "test_taken": [],
        "identities": {f"{name}-seed{seed}": "x" for name in names for seed in seeds},
    }
    results, runs, items = [], [], []
    for form in representations:
        known = {"steps": steps.tolist(), "width": (steps // 2).tolist(), "hard": (steps > 6).tolist()}
        items.append({"items": form, "representation": form, "keys": keys, **known})
    for seed in seeds:
        of_seed = rng.normal(0, spread)
        runs.append(_run("warm", seed, 500, WARM_S))
        for name, effect in effects.items():
            own = of_seed + rng.normal(0, spread / 2)
            length = rng.uniform(0.8, 1.2)
            runs.append(_run(name, seed, budgets[-1], 100 * length))
            for i, (step, level) in enumerate(curve.items()):
                gain = effect / 2 ** (i - 1) if i else 0.0
                for form in representations:
                    chance = np.clip(level + gain + (own if step else of_seed) + difficulty, 0.02, 0.98)
                    right = rng.random(num_items) < chance
                    results.append(
                        {
                            "condition": name,
                            "seed": seed,
                            "identity": "x",
                            "exam": "dev",
                            "label": f"step-{step:08d}",
                            "step": step,
                            "response_tok": int(TOKENS_A_STEP * length * step),
                            "representation": form,
                            "correct": int(right.sum()),
                            "n": num_items,
                            "items": form,
                            "right": "".join("1" if r else "0" for r in right),
                            "floor": 0.16,
                            "errors": {"format": 3, "arithmetic": int((~right).sum()) - 3},
                        }
                    )
    (folder / "study.json").write_text(json.dumps(study))
    for file, rows in (("results.jsonl", results), ("runs.jsonl", runs), ("items.jsonl", items)):
        (folder / file).write_text("".join(json.dumps(row) + "\n" for row in rows))


def _run(condition: str, seed: int, steps: int, wall_s: float) -> dict[str, object]:
    return {
        "condition": condition,
        "seed": seed,
        "identity": "x",
        "steps": steps,
        "stages": [{"name": "words", "steps": steps, "ended_by": "steps"}],
        "tokens": {"prompt_tok": 1000, "response_tok": TOKENS_A_STEP * steps, "forward_tok": 9_000 * steps},
        "wall_s": wall_s,
        "weights_sha256": "0" * 64,
        "versions": {"isomorph": "0.1.0", "torch": "2.13.0"},
        "machine": "somewhere",
        "shortcuts": {"natural": {"sum": 0.16, "back along last listed": 0.33}},
    }
