"""What each reward of a [data.NAME] gives for some rows' own answers: the first check of a reward function."""

from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from isomorph.curriculum.rewards.builtin import BUILTINS
from isomorph.curriculum.rewards.pool import RewardPool
from isomorph.curriculum.rewards.spec import RewardEntry, RewardTable
from isomorph.curriculum.rewards.table_judge import TableJudge, rewarded_sources
from isomorph.curriculum.tasks.task import Task
from isomorph.engine.foreign import printable, shortened
from isomorph.engine.model.text import TextCodec
from isomorph.engine.types import Prompt, Rollout, Scores

MAX_SHOWN_CHARS = 60


def show_rewards(
    data: RewardTable, name: str, columns: Sequence[str], tasks: Sequence[Task], text: TextCodec, console: Console
) -> None:
    """Calls the rewards of [data.``name``] as a run does. Raises UserError for a function that cannot be used."""
    if not data.rewards:
        return
    for entry in data.rewards:
        console.print(
            Text(printable(f"reward {entry.label}, weight {entry.weight:g}: {_said_of(entry)}")), soft_wrap=True
        )
    faults: list[str] = []
    table = Table("row", "response", *(entry.label for entry in data.rewards))
    with (
        RewardPool() as pool,
        TableJudge(rewarded_sources({name: data}, {name: columns}), pool, say=faults.append) as judge,
    ):
        judge.start()
        for i, task in enumerate(tasks):
            responses = _responses(task)
            scores = _scores(judge, i, task, list(responses.values()), text)
            for k, (what, response) in enumerate(responses.items()):
                shown = f"{what}: {shortened(response, MAX_SHOWN_CHARS)}" if response else what
                values = [_shown(scores, entry.label, k) for entry in data.rewards]
                table.add_row(Text(printable(task.place.rpartition(", ")[2])), Text(printable(shown)), *values)
    console.print(table)
    for sentence in faults:
        console.print(Text(printable(sentence)), soft_wrap=True)


def _said_of(entry: RewardEntry) -> str:
    return BUILTINS[entry.function].line if entry.function in BUILTINS else entry.function


def _responses(task: Task) -> dict[str, str]:
    """What a response is -> its text."""
    found = {}
    if task.answer:
        found = {"the accepted answer": task.answer, "it in tags": f"<answer>{task.answer}</answer>"}
    if task.demonstration is not None:
        found["the demonstration"] = task.demonstration
    return {**found, "nothing": ""}


def _scores(judge: TableJudge, number: int, task: Task, texts: Sequence[str], text: TextCodec) -> Scores:
    prompt = Prompt(prompt_id=number, token_ids=(), task=task.family, representation=task.representation, payload=task)
    rollouts = [
        Rollout(
            prompt_id=number,
            sample=i,
            token_ids=torch.tensor(text.encode_response(response)),
            sampler_logprob=None,
            finish="stop",
            policy_version=0,
        )
        for i, response in enumerate(texts)
    ]
    return judge.score([prompt] * len(texts), texts, rollouts)


def _shown(scores: Scores, label: str, response: int) -> str:
    outcome: Any = scores.outcome(label)[response]
    return (
        f"{scores.parts[label][response]:g}"
        if outcome == "value"
        else "does not apply"
        if outcome == "none"
        else outcome
    )
