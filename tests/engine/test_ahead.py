"""One step off: what is drawn ahead, from which weights, with which importance weights; interruptions; two ranks."""

import dataclasses
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from crowd import Crowd
from rich.console import Console
from small_world import one_thread  # noqa: F401
from torch import Tensor
from toy_run import console, gold, gold_but_for_one, make_components, make_policy, make_stage, resumed, sha, source_of

from isomorph.engine.components import Components
from isomorph.engine.config import LoraConfig, SamplerConfig, Stage, UserError
from isomorph.engine.distributed.ranks import Ranks
from isomorph.engine.loop import train
from isomorph.engine.model.lora import attach
from isomorph.engine.model.policy import Policy
from isomorph.engine.record.checkpoint import latest_checkpoint, load_checkpoint
from isomorph.engine.record.runlog import QuietLog, RunLog, read_steps
from isomorph.engine.rollout.apart import SamplerApart
from isomorph.engine.rollout.builtin import BuiltinSampler
from isomorph.engine.rollout.fingerprint import fingerprint
from isomorph.engine.types import Prompt, Publication, Rollout, RunFailed, RunState, Sampling, StepDrift
from isomorph.engine.update.learner import Learner
from isomorph.engine.update.objective import TokenInputs, loss_of_tokens


def apart(policy: Policy) -> SamplerApart:
    return SamplerApart(policy, SamplerConfig(overlap=True))


def make_ahead_stage(name: str = "words", steps: int = 4, **choices: Any) -> Stage:
    given = {"old_logprob": "sampler", "kl_coef": 0.01, **choices.pop("objective_choices", {})}
    return make_stage(name, steps, objective_choices=given, **choices)


STAGES = make_stage("shown", 1, "sft"), make_ahead_stage("a", 3), make_ahead_stage("b", 2)


def make_ahead(folder: Path, *stages: Stage, **options: Any) -> Components:
    return make_components(folder, *stages, judge=gold_but_for_one, evaluates=True, **{"sampler_of": apart, **options})


def rows_of(folder: Path) -> list[dict[str, Any]]:
    timeless = ("time/", "mem/", "publish/", "wall_s")
    return [{k: v for k, v in row.items() if not k.startswith(timeless)} for row in read_steps(folder)]


class Watched(SamplerApart):
    """Keeps the trainer's weights of each version that it was given."""

    def __init__(self, policy: Policy) -> None:
        super().__init__(policy, SamplerConfig(overlap=True))
        self.given: dict[int, list[Tensor]] = {}

    def publish(self, version: int) -> Publication:
        self.given[version] = self.trainer.snapshot()
        return super().publish(version)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Components:
    """A run that nobody disturbs."""
    torch.set_num_threads(1)
    components = make_ahead(tmp_path_factory.mktemp("whole"), *STAGES, sampler_of=Watched)
    state = train(components, RunState())
    assert state.draws == () and state.policy_version == 6
    return components


# -- what is drawn
def test_a_step_is_drawn_from_the_weights_before_the_step_before_it(whole: Components) -> None:
    """Bit for bit what another sampler draws with those weights; a stage begins with its own."""
    assert [row["staleness"] for row in read_steps(whole.log.folder)] == [0, 0, 1, 1, 0, 1]
    assert isinstance(whole.sampler, Watched)
    other = make_policy()
    sampler, stop_ids = BuiltinSampler(other, SamplerConfig()), other.text.stop_ids
    sampling = Sampling(temperature=1.0, max_new_tok=4, samples_per_prompt=8, stop_ids=stop_ids, seed=0)
    for step, groups in list(enumerate(source_of(whole).observed))[1:]:
        version = step - (step not in (1, 4))
        other.overwrite(whole.sampler.given[version])
        wanted = sampler.generate([group.prompt for group in groups], sampling)
        drawn = [rollout for group in groups for rollout in group.rollouts]
        assert {rollout.policy_version for rollout in drawn} == {version}
        for ours, theirs in zip(drawn, wanted, strict=True):
            assert torch.equal(ours.token_ids, theirs.token_ids)
            assert ours.sampler_logprob is not None and theirs.sampler_logprob is not None
            assert torch.equal(ours.sampler_logprob, theirs.sampler_logprob)


def test_prompts_evaluations_and_ends_of_stages_are_those_of_the_run_without_overlap(
    tmp_path: Path, whole: Components
) -> None:
    off = make_ahead(tmp_path, *STAGES, sampler_of=lambda policy: BuiltinSampler(policy, SamplerConfig()))
    train(off, RunState())
    asked = [[[g.prompt.prompt_id for g in groups] for groups in source_of(run).observed] for run in (off, whole)]
    assert asked[0] == asked[1] and len(asked[0]) == 6
    assert [label for label, _ in source_of(whole).graded] == ["start", "shown", "a", "b"]
    rows, wanted = read_steps(whole.log.folder), read_steps(tmp_path)
    assert [row["stage_step"] for row in rows] == [row["stage_step"] for row in wanted]
    assert {row["staleness"] for row in wanted} == {0}
    assert rows[1]["reward/mean"] == wanted[1]["reward/mean"]  # the first of a stage
    assert sha(off) != sha(whole)


def test_the_mismatch_is_measured_with_the_weights_that_drew(whole: Components) -> None:
    """With newer ones it would be a hundred times the limit."""
    rows = read_steps(whole.log.folder)[1:]
    assert all(0 < row["drift/max"] < 1e-5 and row["surprise/z"] is not None for row in rows)


def test_a_sampler_that_reports_wrongly_ends_the_run_before_anything_is_learned_from_it(tmp_path: Path) -> None:
    class Wrong(SamplerApart):
        def generate(self, prompts: Sequence[Prompt], *given: Any) -> list[Rollout]:
            drawn = super().generate(prompts, *given)
            is_off = prompts[0].prompt_id == 12  # the third step
            return [
                dataclasses.replace(r, sampler_logprob=r.sampler_logprob - 0.01)
                if is_off and r.sampler_logprob is not None
                else r
                for r in drawn
            ]

    components = make_ahead(
        tmp_path, make_ahead_stage(), sampler_of=lambda policy: Wrong(policy, SamplerConfig(overlap=True))
    )
    with pytest.raises(RunFailed, match=r"after step 2.*differ by 1.00e-02 nats"):
        train(components, RunState())
    newest = latest_checkpoint(tmp_path / "checkpoints")
    assert newest is not None and load_checkpoint(newest)[0].num_updates == 2


# -- what is learned
def test_importance_weights_are_the_ratio_of_the_two_policies(tmp_path: Path) -> None:
    """Against float64 by hand: plain passes over single sequences, with the weights that drew and with the present."""
    seen: list[tuple[Tensor, Tensor]] = []  # of each update: gradient, weights that it was computed with
    used: list[Tensor] = []

    def spied(objective: Any, stats: Any, inputs: TokenInputs) -> Any:
        assert inputs.sampler_logprob is not None
        used.append((stats.logprob - inputs.sampler_logprob).detach().exp())
        return loss_of_tokens(objective, stats, inputs)

    stage = make_ahead_stage(steps=2, objective_choices=dict(kl_coef=0.0))
    stage = stage.model_copy(update={"batch": stage.batch.model_copy(update={"micro_batch_tok": 4096})})
    components = make_ahead(tmp_path, stage)
    policy = components.policy
    learner = Learner(policy, loss_function=spied)
    components = dataclasses.replace(components, learner=learner)
    enter, start = learner.enter, policy.snapshot()

    def entered(stage: Stage) -> None:
        enter(stage)
        assert learner.optimizer is not None
        step = learner.optimizer.step

        def look(**given: Any) -> float:
            assert learner.optimizer is not None
            seen.append((torch.cat([g.flatten() for g in learner.optimizer.gradients()]), policy.snapshot()))
            return step(**given)

        learner.optimizer.step = look  # type: ignore[method-assign]

    learner.enter = entered  # type: ignore[method-assign]
    train(components, RunState())
    gradient, present = seen[1]
    groups = [g for g in source_of(components).observed[1] if not g.has_zero_variance]
    truth = make_policy()
    truth.model.double()

    def logprobs(weights: Sequence[Tensor]) -> list[Tensor]:
        truth.overwrite([w.double() for w in weights])
        return [_plain_logprob(truth, g.prompt, r) for g in groups for r in g.rollouts]

    with torch.no_grad():
        old = logprobs(start)
    new = logprobs(present)
    ratio = torch.cat([(n - o).exp() for n, o in zip(new, old, strict=True)])
    advantage = torch.cat(
        [torch.full((len(r.token_ids),), a) for g in groups for r, a in zip(g.rollouts, g.advantages, strict=True)]
    ).double()
    assert (ratio - 1).abs().max() > 0.01  # the two policies differ
    torch.testing.assert_close(used[-1].double().sort().values, ratio.detach().sort().values, rtol=2e-5, atol=0)
    bounded = ratio.clamp(1 - 0.2, 1 + 0.28)
    num_tok = read_steps(tmp_path)[1]["tok/response"]  # of the step; groups of equal rewards count, and add 0
    loss = -torch.minimum(ratio * advantage, bounded * advantage).sum() / num_tok
    by_hand = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(truth.named_parameters().values()))])
    torch.testing.assert_close(gradient.double(), by_hand, rtol=1e-3, atol=2e-6)


def _plain_logprob(policy: Policy, prompt: Prompt, rollout: Rollout) -> Tensor:
    """[n] float64 of one response alone, by attention written out."""
    ids = torch.tensor([[*prompt.token_ids, *rollout.token_ids.tolist()]])
    num = ids.shape[1]

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        scores = (q @ k.transpose(-1, -2) * scale).masked_fill(~torch.ones(num, num).tril().bool(), -torch.inf)
        return (scores.softmax(-1) @ v).transpose(1, 2)

    hidden = policy.backbone(ids, torch.arange(num)[None], attend)[0]
    logprob = (hidden @ policy.unembedding.T).log_softmax(-1)
    first = len(prompt.token_ids) - 1
    return logprob[first:-1].gather(1, rollout.token_ids[:, None])[:, 0]


# -- interruptions
# four optimizer steps on each draw
MANY = [
    stage.model_copy(update={"batch": stage.batch.model_copy(update={"prompts_per_update": 3, "num_iterations": 2})})
    for stage in (make_ahead_stage("a", 3), make_ahead_stage("b", 1))
]


Place = tuple[int, bool, int]  # steps observed, whether some of a step's updates are made, rows written


def run_many(folder: Path, stops_at: int) -> tuple[Components, list[Place], RunState | None]:
    """Stopped at the question ``stops_at`` and resumed; where the questions came, and from what it went on."""
    places: list[Place] = []

    def stop_requested() -> bool:
        rows = folder / "steps.jsonl"
        places.append(
            (
                len(source_of(components).observed),
                components.learner.is_within_round,
                len(read_steps(folder)) if rows.exists() else 0,
            )
        )
        return len(places) == stops_at

    components = make_ahead(folder, *MANY, stop_requested=stop_requested)
    try:
        train(components, RunState())
        return components, places, None
    except KeyboardInterrupt:
        newest = latest_checkpoint(folder / "checkpoints")
        assert newest is not None
        state, weights, tensors = load_checkpoint(newest)
    components = make_ahead(folder, *MANY)
    components.policy.overwrite([weights[name] for name in components.policy.named_parameters()])
    components.source.load_state_dict(state.source)
    if state.stage:
        components.learner.restore(next(s for s in MANY if s.name == state.stage), tensors)
    train(components, state)
    return components, places, state


def test_a_run_stopped_anywhere_ends_bit_equal(tmp_path: Path) -> None:
    undisturbed, places, _ = run_many(tmp_path / "undisturbed", 0)
    kept: set[tuple[int, int]] = set()
    for place in sorted(set(places)):
        if place[0] not in (1, 2):
            continue
        stops_at = 1 + places.index(place)
        folder = tmp_path / str(stops_at)
        components, asked, state = run_many(folder, stops_at)
        assert len(asked) == stops_at and state is not None
        kept.add((len(state.draws), state.num_ahead))
        assert sha(components) == sha(undisturbed), place
        assert rows_of(folder) == rows_of(tmp_path / "undisturbed"), place
        assert source_of(components).state_dict() == source_of(undisturbed).state_dict()
    # before the first update of a step; between two of them, with the next step's; between two steps
    assert kept == {(1, 0), (2, 1), (1, 1)}


def test_a_run_that_fails_before_it_learns_keeps_what_older_weights_drew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = make_ahead_stage(steps=4)
    train(undisturbed := make_ahead(tmp_path / "undisturbed", stage), RunState())
    components = make_ahead(tmp_path / "run", stage)
    begin, calls = components.learner.begin, []

    def failing(*given: Any) -> Any:
        calls.append(given)
        if len(calls) == 3:
            raise MemoryError
        return begin(*given)

    with monkeypatch.context() as patched:
        patched.setattr(components.learner, "begin", failing)
        with pytest.raises(RunFailed, match="out of memory"):
            train(components, RunState())
    again, state = resumed(tmp_path / "run", stage, judge=gold_but_for_one, evaluates=True, sampler_of=apart)
    assert state.step == 2 and len(state.draws) == 1
    train(again, state)
    assert sha(again) == sha(undisturbed)


def test_a_drawing_that_fails_lets_the_step_under_way_end(tmp_path: Path) -> None:
    components = make_ahead(tmp_path, make_ahead_stage(steps=4))

    def judge(prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
        if prompts[0].prompt_id >= 12:  # the third step's
            raise KeyError("a defect")
        return gold(prompts, texts)

    components = dataclasses.replace(components, judge=judge)
    with pytest.raises(KeyError, match="a defect"):
        train(components, RunState())
    assert [row["step"] for row in read_steps(tmp_path)] == [1, 2]
    assert "a checkpoint after step 2 has been written" in console(components)
    stage = make_ahead_stage(steps=4)
    again, state = resumed(tmp_path, stage, judge=gold_but_for_one, evaluates=True, sampler_of=apart)
    assert state.step == 2 and state.draws == ()
    train(again, state)
    assert [row["staleness"] for row in read_steps(tmp_path)] == [0, 1, 0, 1]  # drawn by the newer weights, and told


# -- two ranks
@pytest.fixture(scope="module")
def crowd() -> Iterator[Crowd]:
    crowd = Crowd(2)
    yield crowd
    crowd.close()


def trained_on(ranks: Ranks, folder: Path, stops_after: int | None, *, is_resumed: bool) -> tuple[str, int, int]:
    """Hash of the weights, completed steps and kept draws of each rank."""
    stage = make_ahead_stage(steps=4, objective_choices=dict(kl_coef=0.01))
    options: dict[str, Any] = dict(judge=gold_but_for_one, evaluates=True, sampler_of=apart)
    if is_resumed:
        components, state = resumed(folder, stage, **options)
    else:
        components, state = make_components(folder, stage, **options), RunState()

    def stop_requested() -> bool:  # on the second rank only
        return ranks.rank == 1 and len(source_of(components).observed) == stops_after

    learner = components.learner
    learner.ranks = ranks
    log = (RunLog if ranks.is_first else QuietLog)(folder, Console(file=io.StringIO()))
    components = dataclasses.replace(components, ranks=ranks, log=log, stop_requested=stop_requested)
    try:
        state = train(components, state)
    except KeyboardInterrupt:
        newest = latest_checkpoint(folder / "checkpoints")
        assert newest is not None
        state = load_checkpoint(newest)[0]
    return sha(components), state.step, len(state.draws)


def test_two_ranks_draw_ahead_alike_and_a_stopped_run_ends_bit_equal(tmp_path: Path, crowd: Crowd) -> None:
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
    one, two = crowd.ask(_whole, tmp_path / "whole")
    assert one == two and one[1:] == (4, 0)
    rows = rows_of(tmp_path / "whole")
    assert [row["staleness"] for row in rows] == [0, 1, 1, 1]
    assert all(row["drift/max"] < 1e-5 for row in rows)
    stopped = crowd.ask(_stopped, tmp_path / "stopped")
    assert stopped[0] == stopped[1] and stopped[0][1:] == (2, 1)
    assert crowd.ask(_resumed, tmp_path / "stopped") == [one, two]
    assert rows_of(tmp_path / "stopped") == rows


def _whole(ranks: Ranks, folder: Path) -> tuple[str, int, int]:
    return trained_on(ranks, folder, None, is_resumed=False)


def _stopped(ranks: Ranks, folder: Path) -> tuple[str, int, int]:
    return trained_on(ranks, folder, 3, is_resumed=False)


def _resumed(ranks: Ranks, folder: Path) -> tuple[str, int, int]:
    return trained_on(ranks, folder, None, is_resumed=True)


# -- the sampler's weights
def test_adapters_are_copied_and_frozen_weights_are_shared() -> None:
    policy = make_policy()
    policy = Policy(policy.model, policy.text, adapters=attach(policy.model, LoraConfig(rank=2), seed=0, base=None))
    sampler = apart(policy)
    own, theirs = dict(sampler.policy.model.named_parameters()), dict(policy.model.named_parameters())
    shared = {name for name in own if own[name].data_ptr() == theirs[name].data_ptr()}
    assert shared == theirs.keys() - policy.named_parameters().keys() and shared
    before = sampler.publish(1)
    policy.overwrite([0.1 + weight for weight in policy.snapshot()])
    assert fingerprint(policy.weights()) != before.fingerprint == fingerprint(sampler.policy.weights())
    assert sampler.publish(2).fingerprint == fingerprint(policy.weights())


def test_a_gpu_is_refused() -> None:
    policy = make_policy()
    policy.device = torch.device("cuda")
    with pytest.raises(UserError, match=r"sampler.overlap = true is supported on the CPU only.*on cuda"):
        apart(policy)


def test_rollouts_of_older_weights_need_the_samplers_log_probabilities() -> None:
    learner, stage = Learner(make_policy()), make_stage()
    with pytest.raises(ValueError, match='need objective.old_logprob = "sampler".* got "trainer"'):
        learner.begin([], stage, 0, known_drift=StepDrift())
