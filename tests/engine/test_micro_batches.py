import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isomorph.engine.config import ObjectiveConfig, UserError
from isomorph.engine.types import Group, PackedBatch, Prompt, Rollout
from isomorph.engine.update.micro_batches import Update, pack

CPU = torch.device("cpu")
GRPO = ObjectiveConfig(name="grpo")
WITH_KL = ObjectiveConfig(name="grpo", kl_coef=0.1)  # every sequence has a gradient


def group(
    prompt_id: int,
    prompt_len: int,
    response_lens: list[int],
    advantages: list[float] | None = None,
    *,
    sampled: bool = True,
) -> Group:
    """Token ids are unique in the whole group, so that a token tells where it came from."""
    base = 1000 * prompt_id
    prompt = Prompt(
        prompt_id=prompt_id,
        token_ids=tuple(range(base, base + prompt_len)),
        task="t",
        representation="natural",
        payload=None,
    )
    rollouts, first = [], base + prompt_len
    for sample, length in enumerate(response_lens):
        ids = torch.arange(first, first + length)
        first += length
        rollouts.append(
            Rollout(
                prompt_id=prompt_id,
                sample=sample,
                token_ids=ids,
                sampler_logprob=-(ids % 1000).float() if sampled else None,
                finish="stop",
                policy_version=0,
            )
        )
    values = advantages or [1.0 + i for i in range(len(response_lens))]
    return Group(prompt=prompt, rollouts=tuple(rollouts), rewards=tuple(values), advantages=tuple(values))


def packed(groups: list[Group], micro_batch_tok: int = 10_000, objective: ObjectiveConfig = WITH_KL) -> Update:
    (update,) = pack(groups, micro_batch_tok=micro_batch_tok, prompts_per_update=None, objective=objective, device=CPU)
    return update


def predictions(batch: PackedBatch) -> list[tuple[tuple[int, ...], int, float]]:
    """(what the predicting row sees, the target, the sequence's advantage), read from the attention mask alone."""
    mask = batch.layout.dense_mask()
    return [
        (
            tuple(batch.token_ids[mask[row]].tolist()),
            int(target),
            float(batch.advantage[seq]),
        )
        for row, target, seq in zip(batch.row_index, batch.target_ids, batch.seq_id, strict=True)
    ]


def expected(groups: list[Group]) -> list[tuple[tuple[int, ...], int, float]]:
    return [
        ((*g.prompt.token_ids, *r.token_ids[:i].tolist()), int(r.token_ids[i]), a)
        for g in groups
        for r, a in zip(g.rollouts, g.advantages, strict=True)
        for i in range(len(r.token_ids))
    ]


lens = st.integers(1, 7)
some_groups = st.lists(st.tuples(lens, st.lists(lens, min_size=1, max_size=5)), min_size=1, max_size=5)


@settings(max_examples=60, deadline=None)
@given(shapes=some_groups, micro_batch_tok=st.integers(13, 40))
def test_every_token_is_predicted_once_by_a_row_that_sees_exactly_what_came_before(
    shapes: list[tuple[int, list[int]]], micro_batch_tok: int
) -> None:
    groups = [group(i + 1, prompt_len, response_lens) for i, (prompt_len, response_lens) in enumerate(shapes)]
    update = packed(groups, micro_batch_tok)
    got = [p for batch in update.batches for p in predictions(batch)]
    assert sorted(got) == sorted(expected(groups))
    for batch in update.batches:
        assert 0 < len(batch.token_ids) <= micro_batch_tok
        seen_tok = batch.layout.dense_mask().sum(1) - 1
        assert torch.equal(batch.positions, seen_tok)
        assert torch.equal(batch.seq_id, batch.seq_id.sort().values)
        assert batch.sampler_logprob is not None
        assert torch.equal(batch.sampler_logprob, -(batch.target_ids % 1000).float())
    assert update.num_loss_tok == len(expected(groups))
    assert update.num_seqs == sum(len(r) for _, r in shapes)


def test_a_group_within_the_budget_holds_its_prompt_once_and_no_last_token() -> None:
    (batch,) = packed([group(1, 4, [3, 1, 2]), group(2, 2, [2])]).batches
    assert batch.token_ids.tolist() == [1000, 1001, 1002, 1003, 1004, 1005, 1008, 2000, 2001, 2002]
    assert batch.target_ids.tolist() == [1004, 1005, 1006, 1007, 1008, 1009, 2002, 2003]
    assert batch.row_index.tolist() == [3, 4, 5, 3, 3, 6, 8, 9]
    assert batch.seq_id.tolist() == [0, 0, 0, 1, 2, 2, 3, 3]


def test_a_group_above_the_budget_is_split_between_responses() -> None:
    update = packed([group(1, 4, [3, 3, 3])], micro_batch_tok=8)
    assert sorted(len(b.token_ids) for b in update.batches) == [6, 8]
    assert [b.num_seqs for b in update.batches] in ([2, 1], [1, 2])


@pytest.mark.parametrize("first", [1, 2])
def test_a_response_of_one_token_may_come_first(first: int) -> None:
    groups = [group(1, 3, [first, 2])]
    assert sorted(predictions(packed(groups).batches[0])) == sorted(expected(groups))


def test_a_prompt_and_a_response_that_fill_the_budget_exactly_fit() -> None:
    assert len(packed([group(1, 4, [5])], micro_batch_tok=8).batches) == 1
    with pytest.raises(UserError, match=r"4 \+ 4 for prompt 1, got 7: raise it"):
        packed([group(1, 4, [5])], micro_batch_tok=7)
    with pytest.raises(UserError, match="got 3: raise it"):
        packed([group(1, 4, [1])], micro_batch_tok=3)


def test_updates_follow_the_order_of_the_prompts() -> None:
    groups = [group(i, 2, [2, 3]) for i in range(1, 7)]
    updates = pack(groups, micro_batch_tok=100, prompts_per_update=2, objective=WITH_KL, device=CPU)
    prompts = [{int(t) // 1000 for b in u.batches for t in b.token_ids} for u in updates]
    assert prompts == [{1, 2}, {3, 4}, {5, 6}]
    assert [u.num_loss_tok for u in updates] == [10, 10, 10]


def test_a_response_without_advantage_is_left_out_but_stays_in_the_denominators() -> None:
    groups = [group(1, 2, [2, 3, 4], [0.0, 1.0, -1.0]), group(2, 2, [5, 5], [0.0, 0.0])]
    update = packed(groups, objective=GRPO)
    (batch,) = update.batches
    assert batch.advantage.tolist() == [1.0, -1.0]
    assert 2000 not in batch.token_ids
    assert (update.num_loss_tok, update.num_seqs) == (19, 5)
    assert sum(b.num_seqs for b in packed(groups, objective=WITH_KL).batches) == 5


def test_groups_without_any_variance_leave_nothing_to_learn() -> None:
    update = packed([group(1, 2, [2, 3], [0.0, 0.0])], objective=GRPO)
    assert update.batches == ()
    assert update.num_loss_tok == 5


def test_rejection_sampling_counts_only_what_was_accepted() -> None:
    update = packed([group(1, 2, [2, 3, 4], [0.0, 1.0, 0.0])], objective=ObjectiveConfig(name="rft"))
    assert (update.num_loss_tok, update.num_seqs) == (3, 1)
    assert (update.num_zero_advantage_groups, update.num_zero_advantage_seqs) == (0, 2)
    both = packed([group(1, 2, [2, 3], [0.0, 0.0]), group(2, 1, [2, 3], [0.0, 1.0])], objective=GRPO)
    assert (both.num_zero_advantage_groups, both.num_zero_advantage_seqs) == (1, 1)
    kept = packed([group(1, 2, [2, 3], [0.0, 0.0])], objective=WITH_KL)
    assert (kept.num_zero_advantage_groups, kept.num_zero_advantage_seqs) == (0, 0)
    nothing = packed([group(1, 2, [2, 3], [0.0, 0.0])], objective=ObjectiveConfig(name="rft"))
    assert (nothing.num_loss_tok, nothing.num_seqs, nothing.batches) == (0, 0, ())


@pytest.mark.parametrize("bad", [math.nan, -math.inf, math.inf])
def test_a_token_without_a_finite_sampler_logprob_is_dropped_and_counted(bad: float) -> None:
    groups = [group(1, 3, [4, 2])]
    sampler_logprob = groups[0].rollouts[0].sampler_logprob
    assert sampler_logprob is not None
    sampler_logprob[1] = bad
    update = packed(groups)
    got = [p for b in update.batches for p in predictions(b)]
    whole = expected(groups)
    assert got == [whole[0], *whole[2:]]  # what came after it still sees it
    assert (update.num_dropped_tok, update.num_loss_tok, update.num_seqs) == (1, 5, 2)


def test_a_response_without_any_finite_sampler_logprob_does_not_count_as_a_sequence() -> None:
    groups = [group(1, 3, [4, 2])]
    sampler_logprob = groups[0].rollouts[0].sampler_logprob
    assert sampler_logprob is not None
    sampler_logprob[:] = math.nan
    update = packed(groups)
    assert [b.num_seqs for b in update.batches] == [1]
    assert (update.num_dropped_tok, update.num_loss_tok, update.num_seqs) == (4, 2, 1)


def test_dropped_tokens_are_counted_in_responses_that_are_left_out_too() -> None:
    groups = [group(1, 3, [4, 2], [0.0, 0.0])]
    sampler_logprob = groups[0].rollouts[0].sampler_logprob
    assert sampler_logprob is not None
    sampler_logprob[0] = math.nan
    update = packed(groups, objective=GRPO)
    assert (update.num_dropped_tok, update.num_loss_tok) == (1, 5)


def test_demonstrations_carry_no_sampler_logprob_and_drop_nothing() -> None:
    update = packed([group(1, 3, [4], [0.0], sampled=False)], objective=ObjectiveConfig(name="sft"))
    (batch,) = update.batches
    assert batch.sampler_logprob is None
    assert (batch.num_loss_tok, update.num_dropped_tok) == (4, 0)


def test_sampled_responses_and_demonstrations_do_not_mix_in_a_batch() -> None:
    with pytest.raises(ValueError, match="either all rollouts"):
        packed([group(1, 3, [4]), group(2, 3, [4], sampled=False)])


@pytest.mark.parametrize(("prompt_len", "response_lens"), [(0, [2]), (2, [2, 0])])
def test_an_empty_prompt_or_response_is_refused(prompt_len: int, response_lens: list[int]) -> None:
    with pytest.raises(ValueError, match="at least one token"):
        packed([group(1, prompt_len, response_lens)])
