"""STaR in rounds (arXiv 2203.14465), and rejection sampling, which is one round with many samples.

A round samples ``samples`` answers to each of ``prompts`` questions with the weights of the round before, keeps right
ones, and trains on them by SFT for ``epochs`` passes: from those weights, or from those at the stage's start. Its
learning-rate schedule and its optimizer moments begin anew.
"""

import dataclasses
import math
import random
from collections.abc import Sequence
from typing import Any

from isomorph.curriculum.stage_spec import StageRecipe, Star
from isomorph.curriculum.tasks.task import Task
from isomorph.engine.config import UserError
from isomorph.engine.model.text import TextCodec
from isomorph.engine.types import Group, Prompt, SampleRequest


class StarRounds:
    """The rounds of one stage: which is under way, and the questions and answers that it trains on."""

    def __init__(self, stage: StageRecipe, star: Star, seed: int) -> None:
        self.recipe, self.star, self.seed = stage, star, seed
        self.accepted: list[Task] = []  # of the present round, each with an answer as its demonstration
        self.step = 0  # completed steps of the present round
        self.taken = 0  # of its prompts
        self.rounds: list[dict[str, int]] = []  # counts of each round that has begun

    @property
    def num_steps(self) -> int:
        """Steps of the present round: enough for ``epochs`` passes; the last one goes on with a further pass."""
        return math.ceil(self.star.epochs * len(self.accepted) / self.recipe.batch.prompts)

    @property
    def needs_samples(self) -> bool:
        """Whether the present round is over, and another one follows."""
        return self.step == self.num_steps and len(self.rounds) < self.star.rounds

    @property
    def is_over(self) -> bool:
        return self.step == self.num_steps and len(self.rounds) == self.star.rounds

    def stage(self) -> StageRecipe:
        """The stage with the present round's number of steps, which its learning rate follows."""
        return self.recipe.model_copy(update={"steps": max(1, self.num_steps)})

    def request(self, prompts: Sequence[Prompt], stop: tuple[str, ...]) -> SampleRequest:
        return SampleRequest(
            label=f"{self.recipe.name}-round-{len(self.rounds) + 1}",
            prompts=tuple(prompts),
            samples=self.star.samples,
            temperature=self.star.temperature,
            max_new_tok=self.recipe.sampling.max_new_tok,
            seed=self.seed,
            stop=stop,
            start_from=self.star.start_from,
        )

    def record(
        self, groups: Sequence[Group], texts: Sequence[str], correct: Sequence[Sequence[bool]], text: TextCodec
    ) -> str:
        """Chooses what the round trains on; returns a line for the console.

        ``groups``: one for each of the request's prompts; ``texts``: of all answers, in order; ``correct``: whether
        each of a group's answers is right. One that was cut off, or no longer fits when it is written as a
        demonstration, is not kept.
        """
        rng = random.Random(f"{self.seed}:{self.recipe.name}:{len(self.rounds)}")
        self.accepted, self.step, self.taken = [], 0, 0
        right, start, solved = 0, 0, 0
        for group, is_right in zip(groups, correct, strict=True):
            own = texts[start : start + len(group.rollouts)]
            start += len(own)
            right += sum(is_right)
            kept = [
                answer
                for answer, rollout, ok in zip(own, group.rollouts, is_right, strict=True)
                if ok and rollout.finish == "stop" and self._fits(answer, text)
            ]
            solved += bool(kept)
            if kept and self.star.keep == "one":
                kept = [rng.choice(kept)]
            self.accepted += [dataclasses.replace(group.prompt.payload, demonstration=answer) for answer in kept]
        counts = {"asked": len(groups), "sampled": len(texts), "right": right, "solved": solved}
        self.rounds.append({**counts, "trained_on": len(self.accepted), "steps": self.num_steps})
        what = f"{self.num_steps} steps on {len(self.accepted)}" if self.accepted else "nothing to train on"
        return (
            f"{self.recipe.name}, round {len(self.rounds)} of {self.star.rounds}: {right} of {len(texts)} answers are "
            f"right, to {solved} of {len(groups)} questions; {what}"
        )

    def refuse_if_nothing_was_learned(self, num_steps: int) -> None:
        """Raises UserError where the stage has ended without a step."""
        if not num_steps:
            raise UserError(
                f"stage {self.recipe.name}: none of the {sum(r['sampled'] for r in self.rounds)} answers of its "
                f"{len(self.rounds)} round(s) is right and fits, so that there is nothing to train on: raise "
                "star.samples, ask easier questions, or put another stage before it"
            )

    def next_task(self) -> Task:
        """The next question and answer; each pass over them is in an order of its own."""
        number, index = divmod(self.taken, len(self.accepted))
        order = list(range(len(self.accepted)))
        random.Random(f"{self.seed}:{self.recipe.name}:{len(self.rounds)}:{number}").shuffle(order)
        self.taken += 1
        return self.accepted[order[index]]

    def values(self) -> dict[str, float | None]:
        """For steps.jsonl: the number of the round, from 1, and the answers that it trains on."""
        return {"star/round": len(self.rounds), "star/answers": len(self.accepted)}

    def state_dict(self) -> dict[str, Any]:
        return {
            "accepted": [task.to_json() for task in self.accepted],
            "step": self.step,
            "taken": self.taken,
            "rounds": list(self.rounds),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.accepted = [Task.from_json(line) for line in state["accepted"]]
        self.step, self.taken, self.rounds = state["step"], state["taken"], list(state["rounds"])

    def _fits(self, answer: str, text: TextCodec) -> bool:
        return bool(answer.strip()) and len(text.encode_response(answer)) <= self.recipe.sampling.max_new_tok
