"""Warnings of a run that goes on, but in which something is wrong: each is said once a stage, when it begins.

    warning       holds over                            where
    no variance   FLAT_STEPS steps in a row             the rewards of every group are equal, so that they teach
                                                        nothing: all are right, or some are not
    collapse      groups of the last COLLAPSE_STEPS     a prompt that is not solved gets the same response again with a
                  steps that are not solved             probability above 1/2: fewer than two responses to choose from
    dropped       one step                              the sampler gave no finite log-probability for some tokens

What ends a run is in engine/drift.py (the sampler), engine/update (numbers that are not finite) and
engine/update/self_check.py (the direction of an optimizer step).

Both statistics are compared with what chance explains in a run of RUN_STEPS steps, with a probability of a false alarm
of at most FALSE_ALARM a run. No variance: where half of the steps or more have some variance, k steps without begin at
a given step with probability 2^-k at most. Collapse: c is the share of equal pairs among the G responses of a group,
whose mean is sum p^2 over the responses that the policy can give, and 1 / sum p^2 is how many it chooses from. By
Hoeffding, the mean of n independent c in 0..1 exceeds its expectation by more than sqrt(ln(1 / a) / 2n) with
probability a at most; a = FALSE_ALARM / RUN_STEPS. A group whose responses are all correct is solved: that it always
gets the same response is no fault.
"""

import math
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from isomorph.engine.types import Group, StepStats

RUN_STEPS, FALSE_ALARM = 1000, 1e-3
FLAT_STEPS = math.ceil(math.log2(RUN_STEPS / FALSE_ALARM))  # 20
COLLAPSE_STEPS, COLLAPSED = 20, 0.5


@dataclass(slots=True)
class Watch:
    """What the warnings remember of the steps of a stage. It begins anew with each stage, and where a run resumes."""

    stage: str = ""
    flat_steps: int = 0  # in a row
    flat_rewards: set[float] = field(default_factory=set)  # of those steps, up to two
    is_solved: bool = True  # all responses of those steps were correct
    equal: deque[list[float]] = field(default_factory=lambda: deque(maxlen=COLLAPSE_STEPS))  # c of each step's groups
    said: set[str] = field(default_factory=set)

    def observe(
        self, step: int, stage: str, groups: Sequence[Group], solved: Sequence[bool], stats: StepStats
    ) -> list[str]:
        """Returns the warnings that begin with this step, one sentence each, without the word.

        ``groups``: all that were sampled; ``solved``: of each, whether all its responses are correct.
        """
        if stage != self.stage:
            self.stage, self.flat_steps = stage, 0
            self.flat_rewards, self.is_solved, self.said = set(), True, set()
            self.equal.clear()
        return [
            f"step {step}, stage {stage}: {sentence}"
            for sentence in (
                self._no_variance(groups, solved),
                self._collapse(groups, solved, stats),
                self._dropped(stats),
            )
            if sentence
        ]

    def _once(self, kind: str, holds: bool, sentence: str) -> str:
        """``sentence`` at the first step of the stage at which it ``holds``, else nothing."""
        if not holds or kind in self.said:
            return ""
        self.said.add(kind)
        return sentence

    def _no_variance(self, groups: Sequence[Group], solved: Sequence[bool]) -> str:
        if not all(group.has_zero_variance for group in groups):
            self.flat_steps, self.flat_rewards, self.is_solved = 0, set(), True
            return ""
        self.flat_steps += 1
        self.is_solved &= all(solved)
        if len(self.flat_rewards) < 2:  # whether it is one number is all that is said of them
            self.flat_rewards |= {reward for group in groups for reward in group.known_rewards}
        value = f", and every reward was {next(iter(self.flat_rewards)):g}" if len(self.flat_rewards) == 1 else ""
        advice = (
            "the stage has nothing left to teach, or its reward takes anything for right: read completions/; end it "
            "by stage.mastery, or give harder tasks"
            if self.is_solved
            else "read completions/; if answers are right, mend the reward; else give easier or harder tasks, a "
            "warm-up stage, or more samples a prompt"
        )
        return self._once(
            "no variance",
            self.flat_steps >= FLAT_STEPS,
            f"in each of the last {self.flat_steps} steps all responses to a prompt got equal rewards{value}, so that "
            f"rewards taught nothing ({FLAT_STEPS} steps in a row are no chance): {advice}",
        )

    def _collapse(self, groups: Sequence[Group], solved: Sequence[bool], stats: StepStats) -> str:
        self.equal.append(
            [
                share_of_equal_pairs(g)
                for g, done in zip(groups, solved, strict=True)
                if not done and len(g.rollouts) > 1
            ]
        )
        shares = [share for of_step in self.equal for share in of_step]
        if not shares:
            return ""
        mean = math.fsum(shares) / len(shares)
        limit = COLLAPSED + math.sqrt(math.log(RUN_STEPS / FALSE_ALARM) / (2 * len(shares)))
        return self._once(
            "collapse",
            mean > limit,
            f"two responses to a prompt that is not solved are equal with probability {mean:.2f} (mean of "
            f"{len(shares)} groups, above {limit:.2f}; entropy {stats.entropy:.2g} nats a token): the policy has "
            "collapsed to one response before it was right, and explores no more; raise sampling.temperature or "
            "objective.entropy_coef, lower optim.lr, or resume from an earlier checkpoint",
        )

    def _dropped(self, stats: StepStats) -> str:
        num_all = stats.num_dropped_tok + stats.num_loss_tok
        return self._once(
            "dropped",
            stats.num_dropped_tok > 0,
            f"the sampler gave no finite log-probability for {stats.num_dropped_tok} of {num_all} tokens, which were "
            "left out of the loss: its logits overflow, or it drew tokens that it gives no probability; compare its "
            "dtype with the trainer's, and see tok/dropped in steps.jsonl",
        )


def share_of_equal_pairs(group: Group) -> float:
    """Share of the pairs of responses whose tokens are equal; the group needs two responses."""
    counts = Counter(rollout.token_ids.numpy().tobytes() for rollout in group.rollouts).values()
    num = len(group.rollouts)
    return sum(count * (count - 1) for count in counts) / (num * (num - 1))
