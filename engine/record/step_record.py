"""What one step writes: a row of steps.jsonl, its line on the console, and samples in completions/.

Keys of a row; null stands for what was not measured. "Sampled" counts all groups, also those that refills replaced.

    step  stage  stage_step              number of the step in the run; name of the stage; number of the step in it
    policy_version                       of the weights after the step
    staleness                            policy versions between drawing and learning: 0, or 1 with sampler.overlap
    reward/mean  reward/<label>          mean reward of all sampled responses; of those to prompts with that label
    reward/<name>/mean  reward/<name>/std   of one reward of several: of the responses that it has a number for
    reward/<name>/none  reward/<name>/nan   share of the responses that it does not apply to; for which it gave NaN
    reward/<name>/errors  .../deadlines  responses for which it failed, and for which it took too long: both worth 0
    share/<label>                        of the step's prompts, a part of a mixture that changes (fade, adaptive)
    progress/symbols  progress/words     adaptive: learning progress over its standard error before the step
    forgetting/symbols                   adaptive: loss of symbols' reward since they were left, over its error
    star/round  star/answers             STaR: number of the round, from 1; answers that it trains on
    judge/no_answer                      share of the sampled responses in which no answer was found, of those whose
                                         family says what an answer is; what one is to a row, only its rewards know
    groups/all  groups/flat              sampled groups; those whose rewards are all equal
    groups/refilled                      groups that were replaced (batch.refills)
    response/masked                      sampled responses that may not enter the loss: masked, or without a reward
    response/tok_mean  response/stopped  tokens of a response, mean; share of responses that end with a stop token
    response/turns                       turns of a response, mean
    environment/errors  .../timeouts     responses whose environment raised; did not answer in time;
    environment/crashes  .../out_of_turns   ended its process; reached the limit of turns without an end
    tok/prompt  tok/response             tokens of the prompts, once a group; of the responses, written by the model
    tok/response_total                   of the run so far, with those that a source has sampled between steps (STaR)
    tok/context                          tokens of the responses that environments added
    kept/bytes                           of the kept tokens of all responses; only with top_k, top_p or min_p
    tok/trunk                            tokens through the decoder in passes with gradient
    tok/loss  tok/dropped                tokens in the loss; left out: their sampler log-probability is not finite
    loss  grad_norm  lr                  mean over the step's updates; norm before clipping, likewise; learning rate
    clip_frac  entropy  kl               share of tokens without gradient because of the clip; nats; nats
    drift/mean  drift/p999  drift/max    |trainer - sampler log-probability|, nats: mean, 99.9th percentile, maximum
    drift/mass  drift/slope              two more statistics of that mismatch: engine/drift.py
    surprise/z  surprise/limit           are the run's tokens distributed as reported: engine/drift.py
    surprise/needs_tok                   tokens after which that test detects a temperature 5 % off
    updates                              optimizer steps
    publish/bytes                        weight sync: bytes copied; null if the step had none
    publish/move_s  publish/fingerprint_s  publish/probe_s   seconds for copying, hashing, comparing log-probabilities
    wall_s                               seconds since the run began, evaluations and checkpoints included

    exam/SET/accuracy  exam/SET/reward   an evaluation after this step: greedy accuracy on a set of [eval]; mean reward
    exam/SET/LABEL/...                   the same by representation or label; also no_answer, avg@K, pass@K

The curriculum names the ``exam/`` keys, which ``RunLog.write_evaluation`` fills in. ``RunLog.end_step`` adds
``time/...``, and ``engine.record.telemetry`` adds ``mem/...``, ``gpu/...``, ``energy/...``.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from isomorph.engine.drift import Surprise
from isomorph.engine.record.runlog import Row
from isomorph.engine.rollout.turns import count_failures
from isomorph.engine.types import Answers, Group, Prompt, Publication, Rollout, RunState, StepStats
from isomorph.engine.update.score import share_without_answer

Decode = Callable[[Sequence[int]], str]
IsCorrect = Callable[[Prompt, float], bool]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepResult:
    """What a step has sampled and learned."""

    stage: str
    stage_step: int  # completed steps of the stage before this one
    groups: Sequence[Group]  # all that were sampled
    texts: Sequence[str]  # of all responses, in the order of ``groups``
    found: Sequence[bool | None] | None  # whether an answer was found in each text; None: not measured
    is_supervised: bool  # the responses are demonstrations
    told: Mapping[str, float | None]  # by the prompt source, of the step
    num_replaced: int  # groups that were sampled and not trained on, because refills replaced them
    stats: StepStats
    publication: Publication | None  # None: the sampler's weights were up to date
    staleness: int = 0  # policy versions between drawing and learning, the most of any response
    has_environments: bool = False  # of the run: responses may have several turns


def step_row(result: StepResult, state: RunState, label_of: Callable[[Prompt], str]) -> Row:
    """The row of a step, without what ``RunLog.end_step`` adds. ``state``: after the step."""
    groups, stats, sync = result.groups, result.stats, result.publication
    rewards = [r for g in groups for r in g.known_rewards]
    by_label: dict[str, list[float]] = {}
    for group in groups:
        by_label.setdefault(label_of(group.prompt), []).extend(group.known_rewards)
    rollouts = [r for g in groups for r in g.rollouts]
    response_tok = [r.num_model_tok for r in rollouts]
    kept = [r.kept for r in rollouts if r.kept is not None]
    surprise = Surprise.of(state.totals)
    return {
        "step": state.step,
        "stage": result.stage,
        "stage_step": result.stage_step + 1,
        "policy_version": state.policy_version,
        "staleness": result.staleness,
        "reward/mean": _mean(rewards),
        **{f"reward/{label}": _mean(values) for label, values in by_label.items()},
        **_parts_of_rewards(groups),
        **result.told,
        "judge/no_answer": share_without_answer(result.found),
        "groups/flat": sum(g.has_zero_variance for g in groups),
        "groups/all": len(groups),
        "groups/refilled": result.num_replaced,
        "response/masked": 0 if result.is_supervised else sum(not t for g in groups for t in g.is_trained),
        "response/tok_mean": sum(response_tok) / len(response_tok),
        "response/stopped": sum(r.finish == "stop" for r in rollouts) / len(rollouts),
        "response/turns": sum(r.num_turns for r in rollouts) / len(rollouts),
        **(_failed_environments(rollouts) if result.has_environments else {}),
        "tok/prompt": sum(len(g.prompt.token_ids) for g in groups),
        "tok/response": sum(response_tok),
        "tok/response_total": state.totals["response_tok"],
        "tok/context": sum(len(r.token_ids) for r in rollouts) - sum(response_tok),
        **({"kept/bytes": sum(sets.nbytes for sets in kept)} if kept else {}),
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
        "surprise/z": surprise.z,
        "surprise/limit": surprise.limit,
        "surprise/needs_tok": surprise.tokens_needed(),
        "updates": stats.num_updates,
        "publish/bytes": sync.num_bytes if sync else None,
        "publish/move_s": sync.move_s if sync else None,
        "publish/fingerprint_s": sync.fingerprint_s if sync else None,
        "publish/probe_s": sync.probe_s if sync else None,
        "wall_s": state.totals["wall_s"],
    }


def _parts_of_rewards(groups: Sequence[Group]) -> Row:
    """The ``reward/<name>/...`` keys of all rewards that any of the groups' data has."""
    known = [group.scores for group in groups if group.scores is not None]
    found: Row = {}
    for name in dict.fromkeys(name for scores in known for name in scores.parts):
        pairs = [
            pair
            for scores in known
            if name in scores.parts
            for pair in zip(scores.parts[name], scores.outcome(name), strict=True)
            if pair[1] != "absent"
        ]
        values = torch.tensor([value for value, _ in pairs if not math.isnan(value)], dtype=torch.float64)
        counts = Counter(outcome for _, outcome in pairs)
        found |= {
            f"reward/{name}/mean": _mean(values.tolist()),
            f"reward/{name}/std": values.std().item() if len(values) > 1 else math.nan,
            f"reward/{name}/none": counts["none"] / len(pairs) if pairs else math.nan,
            f"reward/{name}/nan": counts["nan"] / len(pairs) if pairs else math.nan,
            f"reward/{name}/errors": counts["error"],
            f"reward/{name}/deadlines": counts["deadline"],
        }
    return found


def _failed_environments(rollouts: Sequence[Rollout]) -> Row:
    return {f"environment/{kind}": num for kind, num in count_failures(rollouts).items()}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def console_line(row: Row) -> str:
    """The line of a whole row, with its times."""
    parts = [
        f"step {row['step']:4d} {row['stage']:<10}",
        f"reward {row['reward/mean']:.3f}",
        *_console_parts(row),
        *(f"{key.replace('_', ' ')} {n}" for key, n in row.items() if key.startswith("environment/") and n),
        *(f"share {key.removeprefix('share/')} {value:.0%}" for key, value in row.items() if key.startswith("share/")),
        f"no answer {row['judge/no_answer']:.0%}" if row["judge/no_answer"] > 0 else "",
        f"zero-variance groups {row['groups/flat']}/{row['groups/all']}",
        "no update" if row["updates"] == 0 else f"entropy {row['entropy']:.3f}  grad {row['grad_norm']:.2f}",
        "" if math.isnan(row["drift/mean"]) else f"drift {row['drift/mean']:.0e}  clip {row['clip_frac']:.1%}",
        f"{row['tok/response'] / row['time/step_s']:.0f} tok/s",
        *(f"{phase} {row[f'time/{phase}_s']:.2f}s" for phase in ("publish", "generate", "update")),
    ]
    return "  ".join(part for part in parts if part)


def _console_parts(row: Row) -> list[str]:
    """Each of several rewards, and how many responses were worth 0 because one failed."""
    means: dict[str, float] = {}
    failed = 0
    for key, value in row.items():
        room, *path = key.split("/")
        if room == "reward" and len(path) == 2:
            means |= {path[0]: value} if path[1] == "mean" else {}
            failed += value if path[1] in ("errors", "deadlines") else 0
    found = [f"{name} {value:.3f}" for name, value in means.items()] if len(means) > 1 else []
    return [*found, f"failed rewards {failed}"] if failed else found


def completion_rows(result: StepResult, decode: Decode, is_correct: IsCorrect) -> list[Row]:
    """A row of completions/step-N.jsonl for every response; ``conversation`` is its text with what was added to it."""
    rows: list[Row] = []
    found: Sequence[bool | None] = result.found or [None] * len(result.texts)
    for group in result.groups:
        correct = group.correct(is_correct)
        for i, rollout in enumerate(group.rollouts):
            drawn: Row = {"sample": rollout.sample, "advantage": group.advantages[i], "finish": rollout.finish}
            if rollout.context_mask is not None:
                drawn |= {"turns": rollout.num_turns, "conversation": decode(rollout.token_ids.tolist())}
            if rollout.environment_reward is not None:
                drawn["environment_reward"] = rollout.environment_reward
            answer = _of_response(result.texts[len(rows)], found[len(rows)], group.rewards[i], correct[i])
            parts = {n: part[i] for n, part in group.scores.parts.items()} if group.scores else {}
            answer |= {"rewards": parts} if parts else {}
            rows.append({**_of_prompt(group.prompt, decode), **drawn, **answer})
    return rows


def sample_rows(groups: Sequence[Group], texts: Sequence[str], decode: Decode, is_correct: IsCorrect) -> list[Row]:
    """A row of completions/STAGE-round-N.jsonl for every response from which demonstrations were chosen."""
    rows: list[Row] = []
    for group in groups:
        for rollout, reward, ok in zip(group.rollouts, group.rewards, group.correct(is_correct), strict=True):
            answer = {"text": texts[len(rows)], "reward": reward, "correct": ok, "finish": rollout.finish}
            rows.append({**_of_prompt(group.prompt, decode), "sample": rollout.sample, **answer})
    return rows


def evaluation_rows(prompts: Sequence[Prompt], answers: Answers, decode: Decode, *, is_greedy: bool) -> list[Row]:
    """A row of completions/exam-LABEL.jsonl for every response; ``sample`` is null for a greedy one."""
    size = len(answers.texts) // len(prompts)
    known: Sequence[bool | None] = answers.found or [None] * len(answers.texts)
    of_responses = zip(answers.texts, known, answers.rewards, answers.correct, strict=True)
    return [
        {
            **_of_prompt(prompts[i // size], decode),
            "sample": None if is_greedy else i % size,
            **_of_response(text, is_found, reward, is_correct),
        }
        for i, (text, is_found, reward, is_correct) in enumerate(of_responses)
    ]


def _of_response(text: str, is_found: bool | None, reward: float, is_correct: bool) -> Row:
    return {"text": text, "answered": is_found, "reward": reward, "correct": is_correct}


def _of_prompt(prompt: Prompt, decode: Decode) -> Row:
    return {
        "prompt_id": prompt.prompt_id,
        "task": prompt.task,
        "representation": prompt.representation,
        "prompt": decode(prompt.token_ids),
    }
