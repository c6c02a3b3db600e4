"""Two gloo ranks against one, and four as two copies of two shards: gradients, statistics, checkpoints, collectives."""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from crowd import Crowd
from safetensors.torch import load_file
from small_world import TINY, WORDS, make_groups, with_advantages
from torch import Tensor
from truth import exact_norms

from isomorph.engine.config import (
    BatchConfig,
    LoraConfig,
    ObjectiveConfig,
    OptimConfig,
    SamplingConfig,
    Stage,
    UserError,
)
from isomorph.engine.distributed.fsdp import full_tensor, shard
from isomorph.engine.distributed.ranks import ALONE, Ranks
from isomorph.engine.model.load import build_tiny
from isomorph.engine.model.lora import attach
from isomorph.engine.model.policy import Policy
from isomorph.engine.record import checkpoint
from isomorph.engine.record.checkpoint import latest_checkpoint, load_checkpoint, load_shards
from isomorph.engine.record.saver import Saver
from isomorph.engine.types import Group, Rollout, RunFailed, RunState, Scores, StepStats
from isomorph.engine.update.learner import Learner
from isomorph.engine.update.micro_batches import pack

NUM_RANKS = 2
GRPO = ObjectiveConfig(name="grpo", clip_low=0.1, clip_high=0.2)
OBJECTIVES = [  # every aggregation, ratio and weight that looks beyond its own token
    GRPO,
    ObjectiveConfig(name="dapo", importance_sampling="token", kl_coef=0.1),
    ObjectiveConfig(name="dr_grpo", entropy_coef=0.01, kl_coef=0.1, kl_estimator="k1"),
    ObjectiveConfig(name="rloo", reward_kl_coef=0.3),
    ObjectiveConfig(name="reinforce_pp", reward_kl_coef=0.3),
    ObjectiveConfig(name="gspo", clip_low=0.05, clip_high=0.05),
    ObjectiveConfig(
        name="cispo", importance_sampling="sequence", importance_sampling_mode="mask", importance_sampling_cap=1.2
    ),
    ObjectiveConfig(name="rft"),
    ObjectiveConfig(name="sft"),
]


# -- a small world
def make_policy(dtype: torch.dtype = torch.float64, lora: LoraConfig | None = None) -> Policy:
    policy = build_tiny(TINY, WORDS, seed=0, dtype=dtype, device=torch.device("cpu"))
    if lora is not None:
        policy = Policy(policy.model, policy.text, adapters=attach(policy.model, lora, seed=0, base=None))
    generator = torch.Generator().manual_seed(0)
    policy.overwrite([0.4 * torch.randn(w.shape, generator=generator) for w in policy.snapshot()])
    exact_norms(policy.model)
    return policy


def make_stage(objective: ObjectiveConfig = GRPO, **tables: Any) -> Stage:
    samples = 1 if objective.is_supervised else 3
    return Stage(
        name="s",
        steps=10,
        objective=objective,
        sampling=SamplingConfig(max_new_tok=9, samples_per_prompt=samples),
        optim=OptimConfig(**tables.get("optim", {})),
        batch=BatchConfig(**{"prompts": 12, **tables.get("batch", {})}),
    )


@pytest.fixture(scope="module")
def crowd() -> Iterator[Crowd]:
    crowd = Crowd(NUM_RANKS)
    yield crowd
    crowd.close()


@pytest.fixture(scope="module")
def four() -> Iterator[Crowd]:
    """Two nodes of two ranks each, for kind = "hybrid": two copies of two shards."""
    crowd = Crowd(4, num_nodes=2)
    yield crowd
    crowd.close()


NUM_SHARDS = {"fsdp": None, "hybrid": 2}  # by the kinds that are sharded


# -- invariant 1: the gradient does not depend on the number of ranks
def step_on(
    ranks: Ranks, objective: ObjectiveConfig, groups: list[Group], batch: dict[str, Any], kind: str = "data"
) -> tuple[list[Tensor], StepStats]:
    """The gradient of each optimizer step, before clipping; the weights are not changed."""
    policy = make_policy(lora=LoraConfig(rank=2) if kind == "adapters" else None)
    stage = make_stage(objective, batch=batch)
    if kind in NUM_SHARDS:
        shard(policy, NUM_SHARDS[kind])
    learner = Learner(policy, ranks, optimizer_on_host=kind == "host")
    learner.enter(stage)
    if objective.needs_reference:
        learner.reference = [0.9 * weight for weight in policy.snapshot()]
    seen: list[Tensor] = []

    def look(**_: Any) -> float:
        assert learner.optimizer is not None
        seen.append(torch.cat([full_tensor(gradient).flatten() for gradient in learner.optimizer.gradients()]))
        return float(seen[-1].norm())

    assert learner.optimizer is not None
    learner.optimizer.step = look  # type: ignore[method-assign]
    updates = pack(
        groups,
        micro_batch_tok=stage.batch.micro_batch_tok,
        prompts_per_update=stage.batch.prompts_per_update,
        objective=objective,
        device=policy.device,
        ranks=ranks,
    )
    return seen, learner.update(updates, stage, 0)


def assert_same_step(
    crowd: Crowd, objective: ObjectiveConfig, groups: list[Group], kind: str = "data", **batch: Any
) -> None:
    whole, stats = step_on(ALONE, objective, groups, batch, "data" if kind in NUM_SHARDS else kind)
    (first, first_stats), *others = crowd.ask(step_on, objective, groups, batch, kind)
    assert len(whole) == len(first) and all(len(first) == len(other) for other, _ in others)
    for i, (one, ours) in enumerate(zip(whole, first, strict=True)):
        assert one.norm() > 1e-3
        assert all(torch.equal(ours, other[i]) for other, _ in others)  # or the ranks would drift apart
        torch.testing.assert_close(ours, one, rtol=0, atol=1e-12)
    found = [numbers(first_stats), *(numbers(stats) for _, stats in others)]
    for name, value in numbers(stats).items():
        if name == "num_forward_tok":  # a split group's prompt and an idle pass count
            continue
        for theirs in found:
            assert theirs[name] == pytest.approx(value, rel=1e-9, nan_ok=True), name


def numbers(stats: StepStats) -> dict[str, Any]:
    """Of the step and of its drift."""
    step = dataclasses.asdict(stats)
    return {**step.pop("drift"), **step}


def test_adapters_get_the_gradient_of_one_rank(crowd: Crowd) -> None:
    assert_same_step(crowd, ObjectiveConfig(name="grpo", kl_coef=0.1), make_groups(), "adapters", micro_batch_tok=14)


def test_an_optimizer_on_the_host_gets_the_gradient_of_one_rank(crowd: Crowd) -> None:
    groups = make_groups(((5, (4, 1, 7)), (3, (2, 2, 2)), (1, (1, 6, 3)), (4, (8, 2, 1))))
    assert_same_step(crowd, GRPO, groups, "host", micro_batch_tok=14, prompts=4, prompts_per_update=2)


by_kind = pytest.mark.parametrize("kind", ["data", "fsdp"])


@by_kind
@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: o.name)
def test_gradient_and_statistics_are_those_of_one_rank(crowd: Crowd, objective: ObjectiveConfig, kind: str) -> None:
    assert_same_step(
        crowd, objective, make_groups(), kind, micro_batch_tok=14
    )  # the first group has several micro-batches


@by_kind
def test_a_rank_without_groups_takes_part(crowd: Crowd, kind: str) -> None:
    groups = make_groups(((5, (4, 1, 7)),))
    assert_same_step(crowd, ObjectiveConfig(name="gspo"), groups, kind, micro_batch_tok=14)
    assert_same_step(
        crowd, ObjectiveConfig(name="dapo", importance_sampling="token", kl_coef=0.1), groups, kind, micro_batch_tok=14
    )
    assert_same_step(crowd, ObjectiveConfig(name="sft"), groups, kind)


@by_kind
def test_every_update_of_a_step_has_a_denominator_of_its_own(crowd: Crowd, kind: str) -> None:
    groups = make_groups(((5, (4, 1, 7)), (3, (2, 2, 2)), (1, (1, 6, 3)), (4, (8, 2, 1))))
    whitened = ObjectiveConfig(name="reinforce_pp", baseline="mean", reward_kl_coef=0.3)  # over all updates of a step
    for objective in (GRPO, ObjectiveConfig(name="dapo"), whitened):
        assert_same_step(
            crowd, objective, groups, kind, micro_batch_tok=14, prompts=4, prompts_per_update=2, num_iterations=2
        )


def test_responses_without_advantage_count_whichever_rank_has_them(crowd: Crowd) -> None:
    groups = make_groups()
    flat = [groups[0], with_advantages(groups[1], 0.0, 0.0, 0.0), with_advantages(groups[2], 0.0, 1.0, 0.0)]
    assert_same_step(crowd, GRPO, flat)


def test_a_step_without_any_gradient_is_left_out_everywhere(crowd: Crowd) -> None:
    flat = [with_advantages(group, 0.0, 0.0, 0.0) for group in make_groups()]
    for gradients, stats in crowd.ask(step_on, GRPO, flat, {}):
        assert gradients == [] and stats.num_updates == 0 and stats.num_loss_tok == 28


def weights_after_steps(ranks: Ranks, dtype: torch.dtype, kind: str, root: Path | None = None) -> Tensor:
    """After three steps; ``root``: the last one by another policy and learner, from a checkpoint written there."""
    stage = make_stage(ObjectiveConfig(name="grpo", kl_coef=0.1), optim=dict(lr=1e-2, clip_norm=0.5))
    policy, learner = started(ranks, dtype, kind)
    learner.enter(stage)
    for seed in range(3):
        if root is not None and seed == 2:
            save(ranks, policy, learner, root)
            policy, learner = resumed(ranks, dtype, kind, stage, root)
        updates = pack(
            make_groups(seed=seed),
            micro_batch_tok=100,
            prompts_per_update=2,
            objective=stage.objective,
            device=policy.device,
            ranks=ranks,
        )
        learner.update(updates, stage, seed)
    with policy.unsharded():
        return torch.cat([p.detach().flatten() for p in policy.named_parameters().values()])


def started(ranks: Ranks, dtype: torch.dtype, kind: str) -> tuple[Policy, Learner]:
    policy = make_policy(dtype)
    if kind in NUM_SHARDS:
        shard(policy, NUM_SHARDS[kind])
    return policy, Learner(policy, ranks)


def save(ranks: Ranks, policy: Policy, learner: Learner, root: Path) -> None:
    """In the background, as a run does between two steps."""
    state = RunState(step=2, stage="s", num_ranks=ranks.size)
    saver = Saver()
    saver.save(root, state, policy.stored(), learner.state_tensors(), ranks, keep=1, waits=False)
    saver.settle(ranks, waits=True)


def resumed(ranks: Ranks, dtype: torch.dtype, kind: str, stage: Stage, root: Path) -> tuple[Policy, Learner]:
    policy, learner = started(ranks, dtype, kind)
    policy.overwrite([torch.zeros_like(weight) for weight in policy.snapshot()])
    newest = latest_checkpoint(root)
    assert newest is not None
    if kind in NUM_SHARDS:
        _, tensors = load_shards(newest, policy.stored(), ranks)
    else:
        _, weights, tensors = load_checkpoint(newest)
        policy.overwrite([weights[name] for name in policy.named_parameters()])
    learner.restore(stage, tensors)
    return policy, learner


@by_kind
def test_weights_stay_the_same_bits_on_all_ranks_and_those_of_one_rank(crowd: Crowd, kind: str) -> None:
    first, second = crowd.ask(weights_after_steps, torch.float64, kind)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, weights_after_steps(ALONE, torch.float64, "data"), rtol=0, atol=1e-10)


@by_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_restored_learner_goes_on_bit_for_bit(crowd: Crowd, kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    whole, other = crowd.ask(weights_after_steps, dtype, kind)
    assert whole.dtype == dtype and torch.equal(whole, other)
    for found in crowd.ask(weights_after_steps, dtype, kind, tmp_path):
        assert torch.equal(found, whole)


# -- a checkpoint of some ranks is read by others
def saved_state(ranks: Ranks, kind: str, root: Path) -> dict[str, Tensor]:
    """Trains two steps in bfloat16, writes a checkpoint and returns what it must hold: float32 masters and moments."""
    stage = make_stage(ObjectiveConfig(name="grpo", kl_coef=0.1), optim=dict(lr=1e-2))
    policy, learner = started(ranks, torch.bfloat16, kind)
    learner.enter(stage)
    for seed in range(2):
        updates = pack(
            make_groups(seed=seed),
            micro_batch_tok=100,
            prompts_per_update=2,
            objective=stage.objective,
            device=policy.device,
            ranks=ranks,
        )
        learner.update(updates, stage, seed)
    save(ranks, policy, learner, root)
    return masters_and_moments(learner)


def found_state(ranks: Ranks, kind: str, root: Path) -> tuple[dict[str, Tensor], list[Tensor]]:
    """What a restored learner holds of the checkpoint, and the weights that its model computes with."""
    stage = make_stage(ObjectiveConfig(name="grpo", kl_coef=0.1), optim=dict(lr=1e-2))
    policy, learner = resumed(ranks, torch.bfloat16, kind, stage, root)
    with policy.unsharded():
        weights = [p.detach().clone() for p in policy.named_parameters().values()]
    return masters_and_moments(learner), weights


def masters_and_moments(learner: Learner) -> dict[str, Tensor]:
    assert learner.optimizer is not None
    found = {f"master/{name}": full_tensor(master.detach()) for name, master in learner.optimizer.masters.items()}
    others = {name: t for name, t in learner.state_tensors().items() if name not in found}
    return found | {name: full_tensor(tensor) for name, tensor in others.items()}


def assert_same_tensors(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys() and any(name.startswith("reference/") for name in wanted)
    for name, tensor in wanted.items():
        # a reference of one rank is in the weights' dtype
        assert torch.equal(found[name].double(), tensor.double()), name


def test_a_checkpoint_of_two_ranks_is_read_by_three_and_by_one(crowd: Crowd, tmp_path: Path) -> None:
    wanted, other = crowd.ask(saved_state, "fsdp", tmp_path)
    assert_same_tensors(other, wanted)
    folder = tmp_path / "step-00000002"
    files = sorted(path.name for path in folder.iterdir())
    assert [name for name in files if name.startswith("weights")] == [
        "weights-00001-of-00002.safetensors",
        "weights-00002-of-00002.safetensors",
    ]
    sizes = [sum(path.stat().st_size for path in folder.glob(f"*-0000{i}-of-*")) for i in (1, 2)]
    assert 0.8 < sizes[0] / sizes[1] < 1.25  # no rank has written what the other has
    three = Crowd(3)
    try:
        answers = three.ask(found_state, "fsdp", tmp_path)
    finally:
        three.close()
    for found, weights in (*answers, found_state(ALONE, "data", tmp_path)):
        assert_same_tensors(found, wanted)
        masters = [tensor for name, tensor in wanted.items() if name.startswith("master/")]
        assert all(torch.equal(w, m.bfloat16()) for w, m in zip(weights, masters, strict=True))


def test_copies_of_shards_learn_what_one_rank_does(four: Crowd) -> None:
    groups = make_groups(((5, (4, 1, 7)), (3, (2, 2, 2)), (1, (1, 6, 3)), (4, (8, 2, 1)), (2, (3, 3, 9))))
    assert_same_step(four, ObjectiveConfig(name="grpo", kl_coef=0.1), groups, "hybrid", micro_batch_tok=14)
    assert_same_step(four, ObjectiveConfig(name="dapo"), groups[:1], "hybrid", micro_batch_tok=14)  # three without any
    first, *others = four.ask(weights_after_steps, torch.float64, "hybrid")  # clipped
    assert all(torch.equal(first, other) for other in others)
    torch.testing.assert_close(first, weights_after_steps(ALONE, torch.float64, "data"), rtol=0, atol=1e-10)


def sums_between_copies(ranks: Ranks) -> tuple[int, int, bool]:
    """All-reduces of an optimizer step of three micro-batches; and whether a step that failed before leaves nothing."""
    policy, learner = started(ranks, torch.float64, "hybrid")
    stage = make_stage(batch=dict(micro_batch_tok=14))
    learner.enter(stage)
    assert learner.optimizer is not None
    learner.optimizer.step = lambda **_: 1.0  # type: ignore[method-assign]
    seen: list[Tensor] = []
    real, num = dist.all_reduce, [0]

    def all_reduce(*arguments: Any, **named: Any) -> Any:
        num[0] += 1
        return real(*arguments, **named)

    groups = make_groups(((5, (4, 1, 7)), (4, (8, 2, 1))) * 4)
    updates = pack(
        groups, micro_batch_tok=14, prompts_per_update=8, objective=stage.objective, device=policy.device, ranks=ranks
    )
    zero = learner.optimizer.zero_grad
    learner.optimizer.zero_grad = lambda: seen.append(flat(learner)) or zero()  # type: ignore[method-assign, func-returns-value]
    dist.all_reduce = all_reduce
    try:
        learner.update(updates, stage, 0)
    finally:
        dist.all_reduce = real
    calls = iter(range(9))

    def fails() -> None:
        if next(calls) == 1:
            raise OverflowError

    learner.on_batch = fails
    with contextlib.suppress(OverflowError):
        learner.update(updates, stage, 0)
    learner.on_batch = lambda: None
    learner.update(updates, stage, 0)
    return len(updates[0].batches), num[0], torch.equal(seen[0], seen[-1])


def flat(learner: Learner) -> Tensor:
    assert learner.optimizer is not None
    return torch.cat(
        [full_tensor(gradient).flatten() for gradient in learner.optimizer.gradients()] or [torch.empty(0)]
    )


def test_gradients_are_summed_between_copies_once_a_step(four: Crowd) -> None:
    units = TINY.num_layers + 1
    for num_batches, num_sums, is_same in four.ask(sums_between_copies):
        assert num_batches > 1 and num_sums == units and is_same


def test_a_checkpoint_of_two_copies_is_written_once_and_read_by_others(
    four: Crowd, crowd: Crowd, tmp_path: Path
) -> None:
    whole, *_ = four.ask(weights_after_steps, torch.bfloat16, "hybrid")
    assert all(torch.equal(found, whole) for found in four.ask(weights_after_steps, torch.bfloat16, "hybrid", tmp_path))
    wanted, *others = four.ask(saved_state, "hybrid", tmp_path)
    for other in others:
        assert_same_tensors(other, wanted)
    folder = tmp_path / "step-00000002"
    files = [[load_file(path) for path in folder.glob(f"*-0000{rank}-of-00004.safetensors")] for rank in (1, 2, 3, 4)]
    sizes = [sum(tensor.nbytes for own in found for tensor in own.values()) for found in files]
    assert sum(sizes) == sum(tensor.nbytes for tensor in wanted.values())  # no tensor twice
    assert max(sizes) < 0.4 * sum(sizes)
    for state, _ in (*crowd.ask(found_state, "fsdp", tmp_path), found_state(ALONE, "data", tmp_path)):
        assert_same_tensors(state, wanted)
    wanted, _ = crowd.ask(saved_state, "fsdp", tmp_path)
    for state, _ in four.ask(found_state, "hybrid", tmp_path):
        assert_same_tensors(state, wanted)


def test_a_checkpoint_of_one_rank_is_read_by_two(crowd: Crowd, tmp_path: Path) -> None:
    wanted = saved_state(ALONE, "data", tmp_path)
    assert (tmp_path / "step-00000002" / "weights.safetensors").is_file()
    for found, _ in crowd.ask(found_state, "fsdp", tmp_path):
        assert_same_tensors(found, wanted)


def refused(ranks: Ranks, root: Path) -> str:
    policy, _ = started(ranks, torch.bfloat16, "fsdp")
    try:
        load_shards(root / "step-00000002", policy.stored(), ranks)
    except UserError as error:
        return str(error)
    return "read"


def test_a_damaged_shard_is_refused_by_every_rank(crowd: Crowd, tmp_path: Path) -> None:
    crowd.ask(saved_state, "fsdp", tmp_path)
    assert crowd.ask(refused, tmp_path) == ["read", "read"]
    file = tmp_path / "step-00000002" / "optimizer-00002-of-00002.safetensors"
    good = file.read_bytes()
    flipped = bytearray(good)
    flipped[-1] ^= 1
    for content, said in ((bytes(flipped), "CRC-32"), (good[:-1], f"has {len(good) - 1} bytes, {len(good)}")):
        file.write_bytes(content)
        first, second = crowd.ask(refused, tmp_path)
        assert first == second and file.name in first and said in first and "not a readable checkpoint" in first
    file.unlink()
    assert all("No such file" in text for text in crowd.ask(refused, tmp_path))


def fails_to_write(ranks: Ranks, root: Path) -> tuple[str, list[str]]:
    """The second rank's disk refuses the second checkpoint; what each rank is told, and what is left."""
    policy, learner = started(ranks, torch.float32, "fsdp")
    learner.enter(make_stage())
    save(ranks, policy, learner, root)
    saver = Saver()
    real = checkpoint.write_parts

    def write_parts(file: Path, parts: Any) -> None:
        raise OSError(28, "No space left on device", str(file))

    if ranks.rank == 1:
        checkpoint.write_parts = write_parts
    try:
        state = RunState(step=3, stage="s", num_ranks=ranks.size)
        saver.save(root, state, policy.stored(), learner.state_tensors(), ranks, keep=1, waits=False)
        saver.settle(ranks, waits=True)
    except RunFailed as error:
        return str(error), sorted(path.name for path in root.iterdir())
    finally:
        checkpoint.write_parts = real
    return "written", []


def test_a_write_that_fails_on_one_rank_fails_on_all_and_leaves_the_checkpoint_before(
    crowd: Crowd, tmp_path: Path
) -> None:
    for said, _ in (answers := crowd.ask(fails_to_write, tmp_path)):
        assert "checkpoint of step 3 could not be written" in said and "No space left" in said
        assert "step-00000002" in said
    assert answers[0][1] == ["step-00000002"]


# -- collectives
def exchange(ranks: Ranks, groups: list[Group]) -> tuple[list[Rollout], list[str], Scores]:
    """Texts and scores that each rank derives from the ids of its own responses."""
    own = [r for group in ranks.share(groups) for r in group.rollouts]
    rewards = tuple(r.prompt_id + r.sample / 8 for r in own)
    scores = Scores(
        rewards=rewards,
        parts={"right": rewards, "short": tuple(reward / 2 for reward in rewards)},
        correct=tuple(reward > 1 for reward in rewards),
        outcomes={name: ("value",) * len(own) for name in ("right", "short")},
    )
    return ranks.exchange(own, [f"{r.prompt_id}.{r.sample}" for r in own], scores, 3)


@pytest.mark.parametrize("num", [0, 1, 2, 5])
def test_responses_arrive_as_they_were_sent_in_the_order_of_all_prompts(crowd: Crowd, num: int) -> None:
    groups = make_groups(tuple((2, (3, 1, 4)) for _ in range(num)))
    unscored = [
        dataclasses.replace(g, rollouts=tuple(dataclasses.replace(r, sampler_logprob=None) for r in g.rollouts))
        for g in groups
    ]
    for group in groups[::2]:  # some with an environment, others without
        about = dict(context_mask=torch.tensor([False, True, True, False]), environment_reward=0.5, num_turns=2)
        rollouts = (*group.rollouts[:2], dataclasses.replace(group.rollouts[2], **about))
        groups[group.prompt.prompt_id] = dataclasses.replace(group, rollouts=rollouts)
    for sent in (groups, unscored):
        wanted = exchange(ALONE, sent)
        assert [text for text in wanted[1]] == [f"{p}.{s}" for p in range(num) for s in range(3)]
        for arrived in crowd.ask(exchange, sent):
            assert arrived[1:] == wanted[1:]
            assert list(map(as_lists, arrived[0])) == list(map(as_lists, wanted[0]))


def as_lists(rollout: Rollout) -> tuple[Any, ...]:
    logprob = None if rollout.sampler_logprob is None else rollout.sampler_logprob.tolist()
    context = None if rollout.context_mask is None else rollout.context_mask.tolist()
    about = (rollout.prompt_id, rollout.sample, rollout.finish, rollout.policy_version)
    turns = (context, rollout.environment_reward, rollout.num_turns)
    return (*about, *turns, rollout.token_ids.tolist(), rollout.token_ids.dtype, logprob)


def ask_the_first(ranks: Ranks, is_refused: bool) -> str:
    def answer() -> int:
        if is_refused:
            raise UserError("no such folder")
        return ranks.rank

    try:
        return f"got {ranks.from_first(answer)}"
    except UserError as error:
        return f"refused: {error}"


def test_what_the_first_rank_finds_all_ranks_know(crowd: Crowd) -> None:
    assert crowd.ask(ask_the_first, False) == ["got 0", "got 0"]
    assert crowd.ask(ask_the_first, True) == ["refused: no such folder"] * 2
    assert ask_the_first(ALONE, False) == "got 0"


def stop_on(ranks: Ranks, stopping: int) -> bool:
    return ranks.any(ranks.rank == stopping)


def test_a_stop_that_one_rank_was_asked_for_stops_all(crowd: Crowd) -> None:
    assert crowd.ask(stop_on, 1) == [True, True]
    assert crowd.ask(stop_on, 7) == [False, False]
