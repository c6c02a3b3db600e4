"""A teacher's right answers to the paper's questions, for ``paper/distillation``: sampled in rounds, as the paper does.

    python studies/teacher_answers.py MODEL asynchow_natural_train.jsonl answers.jsonl [--sampler vllm]

Each round asks what has no right answer yet: 4 samples, then 8, 16, 32 and 64. From the second round on five questions
with accepted answers stand before each question (``examples`` of [data.NAME]). A last round gives the accepted answer
and asks for the steps that lead to it (rationalisation); its answers are judged as all others. Samples are drawn by
``isomorph eval``, which also answers greedily once: that answer counts, too. The rounds stay in --folder, and a round
that is there is not asked again.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from isomorph.curriculum.tasks.jsonl import read_rows

SAMPLES = (4, 8, 16, 32, 64)  # of the rounds without the answer; the last round has the first number again
EXAMPLES = 5
GIVEN = "{question}\\n\\nThe answer is {gold}. Write down the steps that lead to it, and end with it in <answer> tags."
RECIPE = """
[model]
path = {model}
[data.ask]
kind = "rows"
path = "shown.jsonl"
eval_path = "open.jsonl"
prompt = {prompt}
answer = "gold"
demonstration = "answers"
examples = {examples}
max_prompt_tok = {max_prompt_tok}
rewards = [{{ function = {reward} }}]
[[stage]]
name = "none"
steps = 1
sampling.max_new_tok = {max_new_tok}
batch.micro_batch_tok = 1000000
mixture = [{{ data = "ask" }}]
[eval]
data = "ask"
prompts = 1000000
max_new_tok = {max_new_tok}
"""


@dataclass
class Row:
    """A question and the teacher's right answers so far."""

    question: str
    gold: str
    answers: list[str] = field(default_factory=list)

    def written(self) -> str:
        return json.dumps({"question": self.question, "gold": self.gold, "answers": self.answers}) + "\n"


def write(path: Path, rows: Sequence[Row]) -> None:
    path.write_text("".join(row.written() for row in rows))


def ask(rows: list[Row], folder: Path, samples: int, *, is_given: bool, options: argparse.Namespace) -> None:
    """One round: adds the right answers to ``rows``."""
    unsolved = [row for row in rows if not row.answers]
    solved = [row for row in rows if row.answers]
    examples = EXAMPLES if len(solved) > EXAMPLES else 0  # a row has to be left that is not shown
    said = folder / "said.jsonl"
    if not said.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write(folder / "open.jsonl", unsolved)
        # without examples nothing is read of these rows, of which there must be one
        write(folder / "shown.jsonl", solved if examples else [Row("none", "0 min", ["none"])])
        keys = {key: json.dumps(getattr(options, key)) for key in ("model", "reward", "max_prompt_tok", "max_new_tok")}
        prompt = f'"{GIVEN}"' if is_given else '"question"'
        (folder / "ask.toml").write_text(RECIPE.format(prompt=prompt, examples=examples, **keys))
        program = "from isomorph.curriculum.cli import main; main()"
        command = ["eval", options.model, "--recipe", str(folder / "ask.toml"), "--data", "ask"]
        command += ["--samples", str(samples), "--temperature", "1", "--sampler", options.sampler]
        part = folder / "said.part"
        subprocess.run([sys.executable, "-P", "-c", program, *command, "--out", str(part)], check=True)
        part.rename(said)
    form = GIVEN.replace("\\n", "\n")
    asked = {form.format(question=r.question, gold=r.gold) if is_given else r.question: r for r in unsolved}
    for line in said.read_text().splitlines():
        one = json.loads(line)
        if one["correct"]:
            asked[last_turn(one["prompt"])].answers.append(one["text"])


def from_here(reward: str) -> str:
    """``FILE.py:FUNCTION`` with the file's whole path: a recipe's own paths begin at its folder, here a round's."""
    file, _, function = reward.rpartition(":")
    return f"{Path(file).resolve()}:{function}" if file.endswith(".py") else reward


def last_turn(prompt: str | list[dict[str, Any]]) -> str:
    """The question of a prompt, which is a chat where examples stand before it."""
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or hub name of the teacher")
    parser.add_argument("questions", type=Path, help="JSON Lines with question and answer, as the paper's files")
    parser.add_argument("out", type=Path, help="JSON Lines with question, gold and answers: $ISOMORPH_TEACHER")
    parser.add_argument("--sampler", default="builtin", choices=("builtin", "vllm"))
    parser.add_argument("--reward", type=from_here, default="async_plan", help="a built-in reward, or FILE.py:FUNCTION")
    parser.add_argument("--folder", type=Path, help="of the rounds; default: OUT without its ending")
    parser.add_argument("--max-prompt-tok", type=int, default=16384, help="of a question with its examples")
    parser.add_argument("--max-new-tok", type=int, default=6000)
    options = parser.parse_args()
    tasks = read_rows(options.questions, "async_plan", "natural", reward="paper")
    rows = list({task.question: Row(task.question, task.answer) for task in tasks}.values())
    folder = (options.folder or options.out.with_suffix("")).resolve()
    for number, samples in enumerate((*SAMPLES, SAMPLES[0]), start=1):
        if all(row.answers for row in rows):
            break
        is_given = number > len(SAMPLES)
        ask(rows, folder / f"round-{number}", samples, is_given=is_given, options=options)
        solved = sum(bool(row.answers) for row in rows)
        print(f"round {number}{', answers given' if is_given else ''}: {solved} of {len(rows)} have one", flush=True)
    write(options.out, [row for row in rows if row.answers])


if __name__ == "__main__":
    main()
