"""What a step writes: its row of steps.jsonl, its line on the console, and its completions."""

import math
from collections.abc import Sequence

from isomorph.engine.components import Crew
from isomorph.engine.config import Stage
from isomorph.engine.drift import Surprise
from isomorph.engine.record.runlog import Row
from isomorph.engine.types import (
    Exam,
    Group,
    Prompt,
    Publication,
    RunState,
    StepStats,
)
from isomorph.engine.update.score import (
    share_without_answer,
)


def step_row(
    state: RunState,
    stage: Stage,
    stage_step: int,
    groups: Sequence[Group],
    num_refilled: int,
    found: Sequence[bool] | None,
    stats: StepStats,
    publication: Publication | None,
) -> Row:
    """One line of steps.jsonl, but for what ``RunLog.end_step`` adds."""
    rewards = [r for g in groups for r in g.rewards]
    by_representation: dict[str, list[float]] = {}
    for group in groups:
        by_representation.setdefault(group.prompt.representation, []).extend(group.rewards)
    response_tok = [len(r.token_ids) for g in groups for r in g.rollouts]
    return {
        "step": state.step,
        "stage": stage.name,
        "stage_step": stage_step + 1,
        "policy_version": state.policy_version,
        "reward/mean": sum(rewards) / len(rewards),
        **{f"reward/{name}": sum(values) / len(values) for name, values in by_representation.items()},
        "judge/no_answer": share_without_answer(found),
        "groups/flat": sum(g.is_flat for g in groups),
        "groups/all": len(groups),
        "groups/refilled": num_refilled,
        "response/tok_mean": sum(response_tok) / len(response_tok),
        "response/stopped": sum(r.finish == "stop" for g in groups for r in g.rollouts) / len(response_tok),
        "tok/prompt": sum(len(g.prompt.token_ids) for g in groups),
        "tok/response": sum(response_tok),
        "tok/trunk": stats.num_forward_tok,
        "tok/loss": stats.num_loss_tok,
        "tok/dropped": stats.num_dropped_tok,
        "loss": stats.loss,
        "grad_norm": stats.grad_norm,
        "lr": stats.lr,
        "clip_frac": stats.clip_frac,
        "entropy": stats.entropy,
        "kl": stats.kl,
        "drift/mean": stats.drift.mean,
        "drift/p999": stats.drift.p999,
        "drift/max": stats.drift.largest,
        "drift/mass": stats.drift.mass,
        "drift/slope": stats.drift.slope,
        **_surprise(Surprise.of(state.totals)),
        "updates": stats.num_updates,
        "publish/bytes": publication.num_bytes if publication else None,
        "publish/move_s": publication.move_s if publication else None,
        "publish/fingerprint_s": publication.fingerprint_s if publication else None,
        "publish/probe_s": publication.probe_s if publication else None,
        "wall_s": state.totals["wall_s"],
    }


def _surprise(run: Surprise) -> Row:
    return {"surprise/z": run.z, "surprise/limit": run.limit, "surprise/needs_tok": run.tokens_needed()}


def step_line(row: Row) -> str:
    parts = [
        f"step {row['step']:4d} {row['stage']:<10}",
        f"reward {row['reward/mean']:.3f}",
        f"no answer {row['judge/no_answer']:.0%}" if row["judge/no_answer"] > 0 else "",
        f"flat {row['groups/flat']}/{row['groups/all']}",
        "no update" if row["updates"] == 0 else f"entropy {row['entropy']:.3f}  grad {row['grad_norm']:.2f}",
        "" if math.isnan(row["drift/mean"]) else f"drift {row['drift/mean']:.0e}  clip {row['clip_frac']:.1%}",
        f"{row['tok/response'] / row['time/step_s']:.0f} tok/s",
        *(f"{phase} {row[f'time/{phase}_s']:.2f}s" for phase in ("publish", "generate", "update")),
    ]
    return "  ".join(part for part in parts if part)


def completions(crew: Crew, groups: Sequence[Group], texts: Sequence[str], found: Sequence[bool] | None) -> list[Row]:
    rows: list[Row] = []
    known: Sequence[bool | None] = found or [None] * len(texts)
    for group in groups:
        for rollout, reward, advantage in zip(group.rollouts, group.rewards, group.advantages, strict=True):
            drawn = {"sample": rollout.sample, "advantage": advantage, "finish": rollout.finish}
            answer = _judged(crew, group.prompt, texts[len(rows)], known[len(rows)], reward)
            rows.append({**_asked(crew, group.prompt), **drawn, **answer})
    return rows


def answers(
    crew: Crew, exam: Exam, texts: Sequence[str], rewards: Sequence[float], found: Sequence[bool] | None
) -> list[Row]:
    known: Sequence[bool | None] = found or [None] * len(texts)
    return [
        {**_asked(crew, prompt), **_judged(crew, prompt, text, is_found, reward)}
        for prompt, text, is_found, reward in zip(exam.prompts, texts, known, rewards, strict=True)
    ]


def _judged(crew: Crew, prompt: Prompt, text: str, is_found: bool | None, reward: float) -> Row:
    return {"text": text, "answered": is_found, "reward": reward, "correct": crew.source.is_correct(prompt, reward)}


def _asked(crew: Crew, prompt: Prompt) -> Row:
    return {
        "prompt_id": prompt.prompt_id,
        "task": prompt.task,
        "representation": prompt.representation,
        "prompt": crew.policy.text.decode(prompt.token_ids),
    }
