"""Judges the demonstrations of rows before the first step, where only right ones are to be trained on."""

from collections.abc import Callable, Mapping, Sequence

import torch

from isomorph.curriculum.rewards.table_judge import TableJudge
from isomorph.curriculum.rows.source import RowsSource
from isomorph.curriculum.sources import Source, as_prompt
from isomorph.curriculum.tasks.task import Task
from isomorph.engine.model.text import TextCodec
from isomorph.engine.types import Rollout


def accept_demonstrations(
    sources: Mapping[str, Source], judge: TableJudge, text: TextCodec, say: Callable[[str], None]
) -> None:
    """Leaves out demonstrations that the rewards of their data do not find right; ``say`` gets the counts.

    Raises UserError where none is left.
    """

    def accepts(tasks: Sequence[Task]) -> list[bool]:
        prompts = [as_prompt(i, task, text) for i, task in enumerate(tasks)]
        said = [task.demonstration or "" for task in tasks]
        rollouts = [
            Rollout(
                prompt_id=prompt.prompt_id,
                sample=0,
                token_ids=torch.tensor(text.encode_response(words)),
                sampler_logprob=None,
                finish="stop",
                policy_version=0,
            )
            for prompt, words in zip(prompts, said, strict=True)
        ]
        if not tasks:
            return []
        scores = judge.score(prompts, said, rollouts)
        assert scores.correct is not None, "the rewards of rows say what is right"
        return list(scores.correct)

    for source in sources.values():
        if isinstance(source, RowsSource) and source.wants_accepted:
            say(source.accept(accepts))
