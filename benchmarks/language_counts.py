"""How varied the generated language is: frames a kind, domains, distinct words over many questions, as JSON Lines.

python benchmarks/language_counts.py --prompts 5000 --out studies/language.jsonl
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

from isomorph.curriculum.tasks import frames
from isomorph.curriculum.tasks.async_plan import draw_tasks
from isomorph.curriculum.tasks.domains import DOMAINS
from isomorph.curriculum.tasks.procedure import Difficulty

DIFFICULTIES = {
    "terse": Difficulty(form="terse", demonstration="compact"),
    "full, plain": Difficulty(),
    "full, rich": Difficulty(language="rich", max_steps=7, max_predecessors=3, units=("min", "hour", "day")),
}


def row_of(name: str, difficulty: Difficulty, num: int) -> dict[str, Any]:
    texts = [task.question for task in draw_tasks(difficulty, "natural", num, seed=0, split="train")]
    words = {word.lower() for text in texts for word in re.findall(r"[A-Za-z'-]+", text)}
    return {"form": name, "questions": num, "distinct_words": len(words)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=5000)
    parser.add_argument("--out", type=Path, help="JSON Lines; default: the standard output")
    args = parser.parse_args()
    kinds = {"intro": frames.INTROS, "step": frames.STEPS, "edge": frames.EDGES, "question": frames.QUESTIONS}
    rows: list[dict[str, Any]] = [
        {"kind": kind, "frames": len(some), "kept": frames.KEPT} for kind, some in kinds.items()
    ]
    rows.append({"domains": len(DOMAINS), "things": sum(len(domain.things) for domain in DOMAINS)})
    rows += [row_of(name, difficulty, args.prompts) for name, difficulty in DIFFICULTIES.items()]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    if args.out is None:
        print(lines, end="")
    else:
        args.out.write_text(lines)


if __name__ == "__main__":
    main()
