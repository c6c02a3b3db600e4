"""Renders a procedure in its representations: natural language, graph and code, and forms that are held out.

Stages never train on these. A table has rows in place of sentences or syntax, and lists each step's predecessors where
graph and code list successors. The paraphrase and the dialect-like form (``frames`` says after what) are language in
other words or another grammar. The terse forms of all three use only tokens of the trained forms, so that a tiny
word-level model can read them.
"""

import random

from isomorph.curriculum.tasks import wording
from isomorph.curriculum.tasks.language import dialect, paraphrase, rich_natural
from isomorph.curriculum.tasks.longest_path import with_unit
from isomorph.curriculum.tasks.procedure import SECONDS, Difficulty, Duration, Procedure

TRAINED = ("natural", "graph", "code")
HELD_OUT = ("table", "paraphrase", "dialect")
REPRESENTATIONS = TRAINED + HELD_OUT

_SPELLED = {"sec": "second", "min": "minute"}

# All tokens of the terse graph, code and table forms besides numbers and units; the second line with several units.
TERSE_SYNTAX = "graph = {1: [2, 3]} time? print(longest_path()) [(2, 5)] step, after"
TERSE_SYNTAX_OF_UNITS = "durations adj *"


def check_representation(representation: str) -> None:
    """Raises ValueError unless ``representation`` is one of REPRESENTATIONS."""
    if representation not in REPRESENTATIONS:
        raise ValueError(f"representation must be one of {REPRESENTATIONS}, got {representation!r}")


def render(
    procedure: Procedure, representation: str, rng: random.Random, difficulty: Difficulty, *, is_kept: bool = False
) -> str:
    """The whole question in one representation. ``rng`` chooses wordings, and forms of graphs and programs.

    ``is_kept``: in wordings that are kept for the test exam, where natural language has some.

    Raises:
        ValueError: an unknown representation.
    """
    check_representation(representation)
    terse = difficulty.form == "terse"
    is_rich = difficulty.language == "rich"
    if representation == "paraphrase":
        return _paraphrase_terse(procedure, rng) if terse else paraphrase(procedure, rng)
    if representation == "dialect":
        return _natural_terse(procedure, rng, wording.DIALECT_TERSE) if terse else dialect(procedure, rng)
    if representation == "natural" and is_rich:
        return rich_natural(procedure, rng, is_kept=is_kept)
    if is_rich and representation in ("graph", "code") and rng.random() < 0.5:
        return _edge_list(procedure) if representation == "graph" else _schedule(procedure)
    if representation == "natural":
        if not terse:
            return _natural(procedure, rng, difficulty.templates)
        from_kept = is_kept and has_kept_wordings(difficulty)
        return _natural_terse(
            procedure, rng, wording.KEPT_TERSE if from_kept else wording.TERSE.first(difficulty.templates)
        )
    if representation == "graph":
        return (_graph_terse if terse else _graph)(procedure)
    if representation == "code":
        return (_code_terse if terse else _code)(procedure)
    return (_table_terse if terse else _table)(procedure)


def has_kept_wordings(difficulty: Difficulty) -> bool:
    """Whether natural language has wordings that are kept for the test exam: rich, and terse with all templates."""
    is_terse = difficulty.form == "terse" and difficulty.templates == wording.MOST_TEMPLATES
    return is_terse or difficulty.language == "rich"


def spelled(value: int, unit: str) -> str:
    """``1 minute``, ``5 minutes``."""
    return f"{value} {_singular(unit)}{'' if value == 1 else 's'}"


def _singular(unit: str) -> str:
    return _SPELLED.get(unit, unit)


def _natural_terse(procedure: Procedure, rng: random.Random, frames: wording.Frames) -> str:
    intro = rng.choice(frames.intros)
    steps = _step_lines(procedure, rng.choice(frames.steps))
    edges = _edge_lines(procedure, rng, frames.edges)
    question = rng.choice(frames.questions)
    return " ".join([intro, *steps, *edges, question])


def _paraphrase_terse(procedure: Procedure, rng: random.Random) -> str:
    frames = wording.PARAPHRASE_TERSE
    edge = rng.choice(frames.edges)
    edges = [edge.format(b=j + 1, many=_numbers(before)) for j, before in enumerate(procedure.predecessors) if before]
    rng.shuffle(edges)
    steps = _step_lines(procedure, rng.choice(frames.steps))
    return " ".join([rng.choice(frames.intros), *edges, *steps, rng.choice(frames.questions)])


def _natural(procedure: Procedure, rng: random.Random, templates: int) -> str:
    intro = rng.choice(wording.INTROS[:templates]).format(goal=procedure.goal)
    steps = _step_lines(procedure, rng.choice(wording.STEPS[:templates]))
    edges = _edge_lines(procedure, rng, wording.EDGES[:templates])
    order = [rng.choice(wording.CONSTRAINTS[:templates]), *edges] if edges else [wording.NO_EDGES]
    question = rng.choice(wording.QUESTIONS[:templates])
    return _blocks([intro, *steps], order, [question, _instruction()])


def _graph_terse(procedure: Procedure) -> str:
    times = ", ".join(f"{j + 1}: {_bare(procedure, d)}" for j, d in enumerate(procedure.durations))
    name = _common_unit(procedure) or "durations"
    return f"graph = {_adjacency(procedure)} {name} = {{{times}}} time?"


def _graph(procedure: Procedure) -> str:
    times = ", ".join(f"{j + 1}: '{with_unit(d.value, d.unit)}'" for j, d in enumerate(procedure.durations))
    return _blocks(
        [wording.GRAPH_INTRO, _adjacency(procedure)],
        [wording.GRAPH_TIMES, f"{{{times}}}"],
        [wording.GRAPH_QUESTION, _instruction()],
    )


def _edge_list(procedure: Procedure) -> str:
    edges = ", ".join(f"({i + 1}, {j + 1})" for j, before in enumerate(procedure.predecessors) for i in before)
    times = "\n".join(f"node {j + 1}: {with_unit(d.value, d.unit)}" for j, d in enumerate(procedure.durations))
    return _blocks(
        [wording.EDGE_LIST_TIMES, times], [wording.EDGE_LIST, f"[{edges}]"], [wording.GRAPH_QUESTION, _instruction()]
    )


def _schedule(procedure: Procedure) -> str:
    program = _SCHEDULE.format(
        constants=_constants(procedure),
        times=", ".join(f"{j + 1}: {_weight(procedure, j)}" for j in range(procedure.num_steps)),
        needs=", ".join(f"{j + 1}: [{_numbers(before)}]" for j, before in enumerate(procedure.predecessors)),
        unit=procedure.unit,
    )
    return _blocks([wording.CODE_INTRO], ["```python", program, "```"], [wording.CODE_QUESTION, _instruction()])


_SCHEDULE = """{constants}times = {{{times}}}
needs = {{{needs}}}
finished = {{}}
while len(finished) < len(times):
    for step, before in needs.items():
        if step not in finished and all(other in finished for other in before):
            start = max((finished[other] for other in before), default=0)
            finished[step] = start + times[step]

print(max(finished.values()), '{unit}')"""


def _code_terse(procedure: Procedure) -> str:
    rows = ", ".join(_weighted_rows(procedure, end="0"))
    name = _common_unit(procedure) or "adj"
    return f"{name} = {{{rows}}} print(longest_path({name}))"


_PROGRAM = """from functools import cache

{constants}followers = {{
    'start': [{first}],
{rows}
    'end': [],
}}


@cache
def longest_path(node):
    return max((time + longest_path(after) for after, time in followers[node]), default=0)


print(longest_path('start'), '{unit}')"""


def _code(procedure: Procedure) -> str:
    starts = [j + 1 for j, before in enumerate(procedure.predecessors) if not before]
    rows = [f"    {row}," for row in _weighted_rows(procedure, end="'end'")]
    program = _PROGRAM.format(
        constants=_constants(procedure),
        first=", ".join(f"({j}, 0)" for j in starts),
        rows="\n".join(rows),
        unit=procedure.unit,
    )
    return _blocks([wording.CODE_INTRO], ["```python", program, "```"], [wording.CODE_QUESTION, _instruction()])


def _table_terse(procedure: Procedure) -> str:
    head = f"step, {_common_unit(procedure) or 'time'}, after"
    rows = [
        f"{j + 1}, {_bare(procedure, d)}, [{_numbers(before)}]"
        for j, (d, before) in enumerate(zip(procedure.durations, procedure.predecessors, strict=True))
    ]
    return "\n".join([head, *rows, "time?"])


def _table(procedure: Procedure) -> str:
    rows = [
        f"| {j + 1} | {activity} | {spelled(d.value, d.unit)} | {_numbers(before) or '-'} |"
        for j, (activity, d, before) in enumerate(
            zip(procedure.activities, procedure.durations, procedure.predecessors, strict=True)
        )
    ]
    return _blocks(
        [wording.TABLE_INTRO],
        ["| step | what | time | after |", "| --- | --- | --- | --- |", *rows],
        [wording.TABLE_QUESTION, _instruction()],
    )


def _step_lines(procedure: Procedure, pattern: str) -> list[str]:
    return [
        pattern.format(
            number=j + 1, activity=activity, time=with_unit(d.value, d.unit), spelled=spelled(d.value, d.unit)
        )
        for j, (activity, d) in enumerate(zip(procedure.activities, procedure.durations, strict=True))
    ]


def _edge_lines(procedure: Procedure, rng: random.Random, patterns: tuple[str, ...]) -> list[str]:
    edges = [(i, j) for j, before in enumerate(procedure.predecessors) for i in before]
    rng.shuffle(edges)
    return [rng.choice(patterns).format(a=i + 1, b=j + 1) for i, j in edges]


def _blocks(*blocks: list[str]) -> str:
    return "\n\n".join("\n".join(block) for block in blocks)


def _instruction() -> str:
    return wording.INSTRUCTION.format(example="1 min")


def _common_unit(procedure: Procedure) -> str | None:
    """``minutes`` where all durations are in minutes: terse forms then give bare numbers under that name."""
    units = {d.unit for d in procedure.durations}
    return spelled(2, units.pop()).split()[1] if len(units) == 1 else None


def _bare(procedure: Procedure, duration: Duration) -> str:
    return str(duration.value) if _common_unit(procedure) else with_unit(duration.value, duration.unit)


def _weight(procedure: Procedure, i: int) -> str:
    duration = procedure.durations[i]
    return str(duration.value) if _common_unit(procedure) else f"{duration.value} * {_singular(duration.unit)}"


def _constants(procedure: Procedure) -> str:
    if _common_unit(procedure):
        return ""
    used = sorted({d.unit for d in procedure.durations}, key=SECONDS.__getitem__)
    ratios = [f"{_singular(unit)} = {SECONDS[unit] // SECONDS[procedure.unit]}\n" for unit in used]
    return "".join(ratios) + "\n"


def _weighted_rows(procedure: Procedure, *, end: str) -> list[str]:
    """``3: [(4, 7), (5, 7)]``: each edge has the duration of the step it starts at."""
    rows = []
    for i, after in enumerate(procedure.successors):
        names = [str(j + 1) for j in after] or [end]
        rows.append(f"{i + 1}: [{', '.join(f'({name}, {_weight(procedure, i)})' for name in names)}]")
    return rows


def _adjacency(procedure: Procedure) -> str:
    rows = ", ".join(f"{i + 1}: [{_numbers(after)}]" for i, after in enumerate(procedure.successors))
    return f"{{{rows}}}"


def _numbers(steps: list[int] | tuple[int, ...]) -> str:
    return ", ".join(str(j + 1) for j in steps)
