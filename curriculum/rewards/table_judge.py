"""``TableJudge``: the rewards of responses, by the ``RewardTable`` of the data that each prompt comes from."""

import math
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from isomorph.curriculum.rewards.builtin import BUILTINS
from isomorph.curriculum.rewards.code_pool import CodePool
from isomorph.curriculum.rewards.pool import RewardPool
from isomorph.curriculum.rewards.signature import TRIAL, GroupInput, Progress, RewardFunction, classify
from isomorph.curriculum.rewards.spec import RewardEntry, RewardTable
from isomorph.curriculum.rewards.user_code import DoesNotFit, load
from isomorph.curriculum.rewards.worker import Call, Fault, Place, Result, called
from isomorph.curriculum.rows.spec import ROWS
from isomorph.curriculum.tasks.task import FULL_MARKS, Task
from isomorph.engine.config import UserError
from isomorph.engine.distributed.ranks import Ranks
from isomorph.engine.foreign import one_line
from isomorph.engine.types import Outcome, Prompt, Rollout, RunFailed, Scores
from isomorph.engine.update.score import normalised_sum


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """The data of one ``[data.NAME]``, as far as its rewards need it."""

    table: RewardTable
    columns: frozenset[str]  # of its rows


def rewarded_sources(data: Mapping[str, Any], columns: Mapping[str, Sequence[str]]) -> dict[str, Source]:
    """The tables of ``data`` that say how responses are rewarded; ``columns``: of the rows of each."""
    return {
        name: Source(table=table, columns=frozenset(columns[name]))
        for name, table in data.items()
        if isinstance(table, RewardTable)
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class _Given:
    """The responses to one prompt."""

    task: Task
    rollouts: Sequence[Rollout]
    group: GroupInput
    max_new_tok: int


@dataclass(slots=True, kw_only=True)
class _Entry:
    """A reward of one table: called here, where it is known to return, or in a worker."""

    entry: RewardEntry
    here: RewardFunction | None = None
    index: int = -1  # of the pool's places
    is_for_group: bool = False
    wants_token_ids: bool = False


@dataclass(slots=True)
class Counts:
    """Failures of a run so far, by reward and kind; of a resumed run since it resumed."""

    by_name: dict[str, dict[str, int]] = field(default_factory=dict)

    def add(self, name: str, kind: str) -> bool:
        """Counts one; returns whether it is the first of its kind."""
        kinds = self.by_name.setdefault(name, {})
        kinds[kind] = kinds.get(kind, 0) + 1
        return kinds[kind] == 1


class TableJudge:
    """Satisfies the engine's ``Judge`` and ``PartsJudge``; prompts' payloads are ``Task``s.

    A task of the family "rows" is rewarded by the table of its ``data``, any other by ``pool``. Call ``start`` before
    the first response: it imports the functions and refuses those that cannot be used.
    """

    def __init__(
        self,
        sources: Mapping[str, Source],
        pool: RewardPool,
        *,
        log: Path | None = None,
        say: Callable[[str], None] = lambda sentence: None,
        seed: int = 0,
        max_new_tok: Callable[[Prompt], int] = lambda prompt: 1 << 62,
        progress: Callable[[], Progress] = lambda: Progress(step=0, max_steps=0),
        max_workers: int | None = None,
    ) -> None:
        """``log``: what functions print is appended to it. ``say``: prints a warning. ``seed``: the run's.

        ``max_new_tok``: the length limit of the responses to a prompt, for ``overlong``.
        """
        self.sources, self.pool, self.say, self.seed = sources, pool, say, seed
        self.max_new_tok, self.progress = max_new_tok, progress
        self.counts = Counts()
        self._entries: dict[str, list[_Entry]] = {}
        places: list[Place] = []
        self._columns: list[frozenset[str]] = []
        for name, source in sources.items():
            self._entries[name] = []
            for entry in source.table.rewards:
                if entry.is_in_worker:
                    self._entries[name].append(_Entry(entry=entry, index=len(places)))
                    places.append(Place(entry.place, entry.arguments))
                    self._columns.append(source.columns)
                else:
                    self._entries[name].append(_Entry(entry=entry))
        self.code = CodePool(places, log=log, max_workers=max_workers)

    def start(self) -> None:
        """Imports all functions. Raises UserError for one that cannot be used, with the reason."""
        for name, entries in self._entries.items():
            for each in entries:
                known = BUILTINS.get(each.entry.function)
                if known is not None and (missing := known.missing_packages):
                    raise UserError(
                        f"data.{name}.rewards: {each.entry.function} needs {' and '.join(missing)}: pip install "
                        f"'isomorph[{known.extra}]'"
                    )
                if each.index < 0:
                    self._start_here(name, each)
        found = self.code.describe(self._columns) if self.code.places else []
        for name, entries in self._entries.items():
            for each in (e for e in entries if e.index >= 0):
                told = found[each.index]
                if isinstance(told, Fault):
                    raise UserError(f"data.{name}.rewards: {one_line(told.sentence)}")
                if told.missing:
                    columns = ", ".join(sorted(self.sources[name].columns)) or "none"
                    raise UserError(
                        f"data.{name}.rewards: {each.entry.function} has the parameter {told.missing[0]!r}, which must "
                        f"be a column of the rows; they have {columns}. Rename one, or give it in arguments"
                    )
                each.is_for_group, each.wants_token_ids = told.is_for_group, told.wants_token_ids

    def _start_here(self, name: str, each: _Entry) -> None:
        try:
            each.here = classify(load(each.entry.place), each.entry.arguments)
        except DoesNotFit as error:
            raise UserError(f"data.{name}.rewards: {each.entry.function} {error}") from None
        each.is_for_group, each.wants_token_ids = each.here.is_for_group, each.here.wants_token_ids
        response = None if each.is_for_group else 0
        (tried,) = called(each.here, TRIAL, response, Progress(step=0, max_steps=0), None)
        if isinstance(tried, Fault):
            raise UserError(f"data.{name}.rewards: {each.entry.function}: {one_line(tried.sentence)}")

    def close(self) -> None:
        """Ends the workers of the functions; ``pool`` is the caller's."""
        self.code.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def failures(self, ranks: Ranks) -> dict[str, int]:
        """Responses with a reward of 0.0 because scoring failed, over all ranks; of a resumed run since it resumed.

        Those of a [data.NAME]'s rewards by name and kind, as ``right/deadline``. A collective.
        """
        own = {"timeouts": self.pool.num_timeouts, "crashes": self.pool.num_crashes, "errors": self.pool.num_errors}
        own |= {f"{name}/{kind}": num for name, kinds in self.counts.by_name.items() for kind, num in kinds.items()}
        counted = ranks.gather(own)
        names = dict.fromkeys(name for counts in counted for name in counts)
        return {name: sum(counts.get(name, 0) for counts in counted) for name in names}

    def __call__(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
        """Rewards of tasks that no table rewards. Raises TypeError for others, which need the rollouts."""
        if any(self._is_of_table(prompt) for prompt in prompts):
            raise TypeError("responses to rows are rewarded by score, which is given their rollouts")
        return self.pool(prompts, texts)

    def score(self, prompts: Sequence[Prompt], texts: Sequence[str], rollouts: Sequence[Rollout]) -> Scores:
        """Raises RunFailed where a reward fails whose table has ``on_error = "stop"``."""
        spans = _spans(prompts)
        by_table: dict[str | None, list[tuple[int, int]]] = {}
        for span in spans:
            prompt = prompts[span[0]]
            by_table.setdefault(prompt.payload.data if self._is_of_table(prompt) else None, []).append(span)
        found: dict[int, Scores] = {}
        for name, own in by_table.items():
            if name is None:
                at = [i for start, stop in own for i in range(start, stop)]
                rewards = tuple(self.pool([prompts[i] for i in at], [texts[i] for i in at]))
                all_scores = Scores(rewards=rewards, correct=tuple(reward >= FULL_MARKS for reward in rewards))
                scores = _cut(all_scores, own)
            else:
                scores = self._by_table(name, [_given(prompts, texts, rollouts, *span, self) for span in own])
            found |= {span[0]: part for span, part in zip(own, scores, strict=True)}
        return Scores.joined([found[start] for start, _ in spans])

    def _is_of_table(self, prompt: Prompt) -> bool:
        return getattr(prompt.payload, "family", None) == ROWS and prompt.payload.data in self.sources

    def wants_token_ids(self, name: str) -> bool:
        """Whether a reward of the data ``name`` reads the responses' tokens."""
        return any(each.wants_token_ids for each in self._entries[name])

    def _by_table(self, name: str, given: Sequence[_Given]) -> list[Scores]:
        table, entries = self.sources[name].table, self._entries[name]
        groups, progress = [each.group for each in given], self.progress()
        calls = [
            Call(each.index, g, i)
            for each in entries
            if each.index >= 0
            for g, group in enumerate(groups)
            for i in ([None] if each.is_for_group else range(len(group.texts)))
        ]
        answered: dict[tuple[int, int], list[Result]] = {}
        results = self.code.run(groups, calls, progress, table.deadline_s) if calls else []
        for call, result in zip(calls, results, strict=True):
            answered.setdefault((call.function, call.group), []).extend(result)
        scored = []
        for g, each_given in enumerate(given):
            parts: dict[str, list[Result]] = {}
            for each in entries:
                if each.here is None:
                    parts[each.entry.label] = answered[each.index, g]
                else:
                    responses = [None] if each.is_for_group else range(len(groups[g].texts))
                    parts[each.entry.label] = [
                        r for i in responses for r in called(each.here, groups[g], i, progress, None)
                    ]
            scored.append(self._combined(table, each_given, parts))
        return scored

    def _combined(self, table: RewardTable, given: _Given, parts: dict[str, list[Result]]) -> Scores:
        values = {label: [self._worth(given.task, table, label, r) for r in part] for label, part in parts.items()}
        outcomes: dict[str, tuple[Outcome, ...]] = {
            label: tuple(_outcome(result) for result in part) for label, part in parts.items()
        }
        weights = {entry.label: entry.weight for entry in table.rewards}
        num, first = len(given.rollouts), next(iter(values), "environment")
        extra: dict[str, list[float]] = {}
        told = [rollout.environment_reward for rollout in given.rollouts]
        has_environment = getattr(table, "environment", None) is not None
        if any(reward is not None for reward in told) or (has_environment and not table.rewards):
            # a rollout that a limit ended before its environment gave a reward is worth 0 to it
            extra["environment"] = [0.0 if reward is None else reward for reward in told]
        if table.overlong is not None:
            soft = table.overlong.soft
            punished = [soft_overlong(n, given.max_new_tok, soft) for n in given.group.num_tok]
            extra["overlong"] = [table.overlong.penalty * value for value in punished]
        weights |= dict.fromkeys(extra, 1.0)
        everything = {**values, **extra}
        # a punishment of length alone makes no reward of a response that none applies to
        is_rewarded = [
            any(not math.isnan(part[i]) for label, part in everything.items() if label != "overlong")
            for i in range(num)
        ]
        if "overlong" in extra:
            extra["overlong"] = everything["overlong"] = [
                value if known else math.nan for value, known in zip(extra["overlong"], is_rewarded, strict=True)
            ]
        outcomes |= {
            label: tuple("none" if math.isnan(value) else "value" for value in part) for label, part in extra.items()
        }
        relative = normalised_sum(everything, weights) if table.combine == "normalized" else None
        rewards = [
            combined({k: v[i] for k, v in values.items()}, {k: v[i] for k, v in extra.items()}, weights, table.combine)
            for i in range(num)
        ]
        cut_off = [rollout.finish == "length" for rollout in given.rollouts]
        return Scores(
            rewards=tuple(rewards),
            parts={label: tuple(part) for label, part in everything.items()},
            correct=tuple(value >= FULL_MARKS for value in everything.get(first, [math.nan] * num)),
            masked=tuple(cut_off) if table.mask_truncated else None,
            outcomes=outcomes,
            relative=None if relative is None else tuple(relative),
        )

    def _worth(self, task: Task, table: RewardTable, label: str, result: Result) -> float:
        """The number of a result: NaN where the reward does not apply, 0 where it failed."""
        if not isinstance(result, Fault):
            return math.nan if result is None else result
        is_first = self.counts.add(label, result.kind)
        row = f" on {task.place}" if task.place else ""
        sentence = f"reward {label} of data.{task.data}{row}: {one_line(result.sentence)}"
        if table.on_error == "stop":
            raise RunFailed(f'{sentence}; the run ends, because data.{task.data}.on_error is "stop"')
        if is_first:
            self.say(f"warning: {sentence}; such a response is worth 0 to it, and further ones are only counted")
        return 0.0


def combined(values: Mapping[str, float], added: Mapping[str, float], weights: Mapping[str, float], how: str) -> float:
    """The reward of a response: by ``how`` of ``values``, plus ``added``; NaN, where all are, is left out."""
    known = [weights[name] * value for name, value in values.items() if not math.isnan(value)]
    more = [value for value in added.values() if not math.isnan(value)]
    if not known and not more:
        return math.nan
    core = (math.prod(known) if known else 0.0) if how == "product" else math.fsum(known)
    return core + math.fsum(more)


def soft_overlong(num_tok: int, limit: int, soft: int) -> float:
    """0 to -1 for a response of ``num_tok`` tokens: DAPO (arXiv 2503.14476), equation 13."""
    return -min(1.0, max(0.0, (num_tok - (limit - soft)) / soft))


def _outcome(result: Result) -> Outcome:
    return result.kind if isinstance(result, Fault) else "none" if result is None else "value"


def _spans(prompts: Sequence[Prompt]) -> list[tuple[int, int]]:
    """Where the responses to each prompt begin and end."""
    starts = [i for i, prompt in enumerate(prompts) if i == 0 or prompt.prompt_id != prompts[i - 1].prompt_id]
    return list(zip(starts, [*starts[1:], len(prompts)], strict=True))


def _cut(scores: Scores, spans: Iterable[tuple[int, int]]) -> list[Scores]:
    parts, start = [], 0
    for span in spans:
        size = span[1] - span[0]
        parts.append(scores.slice(start, start + size))
        start += size
    return parts


def _given(
    prompts: Sequence[Prompt],
    texts: Sequence[str],
    rollouts: Sequence[Rollout],
    start: int,
    stop: int,
    judge: TableJudge,
) -> _Given:
    task: Task = prompts[start].payload
    own = rollouts[start:stop]
    group = GroupInput(
        prompt=task.question,
        messages=task.messages,
        gold=task.answer,
        row=task.row,
        data=task.data,
        texts=tuple(texts[start:stop]),
        finish=tuple(r.finish for r in own),
        num_tok=tuple(r.num_model_tok for r in own),
        token_ids=tuple(tuple(r.token_ids.tolist()) for r in own) if judge.wants_token_ids(task.data) else (),
        seed=zlib.crc32(f"{judge.seed}:{prompts[start].prompt_id}".encode()),
    )
    return _Given(task=task, rollouts=own, group=group, max_new_tok=judge.max_new_tok(prompts[start]))
