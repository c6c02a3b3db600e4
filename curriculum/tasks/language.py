"""Natural language of the full form with ``language = "rich"``, its paraphrase, and its dialect-like form.

Many sentence frames; steps named by their activity as often as by number; sentences for several edges at once; and
sentences with numbers that have nothing to do with the answer. Every question still states exactly the procedure.
"""

import random
from collections.abc import Sequence

from isomorph.curriculum.tasks import frames
from isomorph.curriculum.tasks.longest_path import with_unit
from isomorph.curriculum.tasks.procedure import Procedure
from isomorph.curriculum.tasks.wording import INSTRUCTION

BY_NAME = 0.3  # of the references to a step
MERGED = 0.5  # of the steps with several predecessors or successors
MOST_DISTRACTORS = 2

_SPELLED = {"sec": "second", "min": "minute"}


def chosen(rng: random.Random, kind: Sequence[str], *, is_kept: bool) -> str:
    """A frame: of those kept for the test exam, or of the others."""
    return rng.choice(kind[-frames.KEPT :] if is_kept else kind[: -frames.KEPT])


def rich_natural(procedure: Procedure, rng: random.Random, *, is_kept: bool) -> str:
    """A whole question. ``is_kept``: in frames that are kept for the test exam."""
    intro = chosen(rng, frames.INTROS, is_kept=is_kept).format(goal=procedure.goal)
    step = chosen(rng, frames.STEPS, is_kept=is_kept)
    steps = [_step(procedure, step, j) for j in range(procedure.num_steps)]
    edges = _edges(procedure, rng, is_kept=is_kept)
    for _ in range(rng.randint(0, MOST_DISTRACTORS)):
        edges.insert(rng.randint(0, len(edges)), _distractor(rng))
    order = [rng.choice(frames.CONSTRAINTS) if any(procedure.predecessors) else frames.NO_EDGES]
    question = chosen(rng, frames.QUESTIONS, is_kept=is_kept)
    return _blocks([intro, *steps], [*order, " ".join(edges)], [question, INSTRUCTION.format(example="1 min")])


def paraphrase(procedure: Procedure, rng: random.Random) -> str:
    """The question first, then the order, then the activities: all in words of its own."""
    step = rng.choice(frames.PARAPHRASE_STEPS)
    order = []
    for j, before in enumerate(procedure.predecessors):
        if before:
            many = _listed([f"activity {i + 1}" for i in before])
            order.append(_capital(rng.choice(frames.PARAPHRASE_EDGES).format(b=j + 1, many=many)))
    rng.shuffle(order)
    return _blocks(
        [rng.choice(frames.PARAPHRASE_INTROS).format(goal=procedure.goal), rng.choice(frames.PARAPHRASE_QUESTIONS)],
        order or ["Activities are free of each other."],
        [_step(procedure, step, j) for j in range(procedure.num_steps)],
        [INSTRUCTION.format(example="1 min")],
    )


def dialect(procedure: Procedure, rng: random.Random) -> str:
    """By grammar rules of African American English; see ``frames``."""
    step = rng.choice(frames.DIALECT_STEPS)
    edges = [
        rng.choice(frames.DIALECT_EDGES).format(a=i + 1, b=j + 1)
        for j, before in enumerate(procedure.predecessors)
        for i in before
    ]
    rng.shuffle(edges)
    return _blocks(
        [rng.choice(frames.DIALECT_INTROS).format(goal=procedure.goal)]
        + [_step(procedure, step, j) for j in range(procedure.num_steps)],
        edges or ["Don't no step gotta wait on nothin'."],
        [rng.choice(frames.DIALECT_QUESTIONS), INSTRUCTION.format(example="1 min")],
    )


def _step(procedure: Procedure, frame: str, j: int) -> str:
    duration = procedure.durations[j]
    unit = _SPELLED.get(duration.unit, duration.unit)
    spelled = f"{duration.value} {unit}{'' if duration.value == 1 else 's'}"
    time = with_unit(duration.value, duration.unit)
    return _capital(frame.format(n=j + 1, act=procedure.activities[j], time=time, spelled=spelled))


def _edges(procedure: Procedure, rng: random.Random, *, is_kept: bool) -> list[str]:
    left = {(i, j) for j, before in enumerate(procedure.predecessors) for i in before}
    sentences = []
    for step in rng.sample(range(procedure.num_steps), procedure.num_steps):
        for is_out in (True, False):
            own = sorted(edge for edge in left if edge[0 if is_out else 1] == step)
            if len(own) != 2 or rng.random() >= MERGED:
                continue
            left -= set(own)
            one = _reference(procedure, rng, step)
            others = [edge[1 if is_out else 0] + 1 for edge in own]
            many = f"steps {others[0]} and {others[1]}"
            kind = frames.FANS_OUT if is_out else frames.FANS_IN
            sentences.append(_capital(rng.choice(kind).format(a=one, b=one, many=many)))
    for i, j in sorted(left):
        a, b = (_reference(procedure, rng, k) for k in (i, j))
        sentences.append(_capital(chosen(rng, frames.EDGES, is_kept=is_kept).format(a=a, b=b)))
    rng.shuffle(sentences)
    return sentences


def _reference(procedure: Procedure, rng: random.Random, j: int) -> str:
    return f'the task "{procedure.activities[j]}"' if rng.random() < BY_NAME else f"step {j + 1}"


def _distractor(rng: random.Random) -> str:
    return rng.choice(frames.DISTRACTORS).format(
        name=rng.choice(frames.NAMES), place=rng.choice(frames.PLACES), number=rng.randint(2, 60)
    )


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _blocks(*blocks: Sequence[str]) -> str:
    return "\n\n".join("\n".join(line for line in block if line) for block in blocks)
