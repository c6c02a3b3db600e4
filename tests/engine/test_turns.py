"""Rollouts of several turns: their fields, and both sides of the built-in sampler's conversation."""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace

import pytest
import torch
from echo import Echo
from small_world import CPU, NUM_VOCAB, WORDS, one_thread  # noqa: F401
from stop_truth import first_end
from truth import exact_norms, transformers_twin

from isomorph.engine.config import ObjectiveConfig, SamplerConfig, TinyModel
from isomorph.engine.drift import check_ends
from isomorph.engine.model.load import build_tiny
from isomorph.engine.model.policy import Policy
from isomorph.engine.packed_batch import Part, pack_parts
from isomorph.engine.rollout import builtin, turns
from isomorph.engine.rollout.builtin import BuiltinSampler
from isomorph.engine.rollout.turns import Conversations, count_failures
from isomorph.engine.serialise import join_scored, split_scored
from isomorph.engine.types import Group, Prompt, Reply, Rollout, RunFailed, Sampling, ScoredRollouts, Scores
from isomorph.engine.update.micro_batches import pack
from isomorph.engine.update.score import response_text
from isomorph.kernels import backend

STOP = 1


def make_policy(dtype: torch.dtype = torch.float64) -> Policy:
    tiny = TinyModel(hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=24, max_model_len=128)
    policy = build_tiny(tiny, WORDS, seed=0, dtype=dtype, device=CPU)
    if dtype == torch.float64:
        exact_norms(policy.model)
    generator = torch.Generator().manual_seed(0)
    policy.overwrite([0.35 * torch.randn(w.shape, generator=generator) for w in policy.snapshot()])
    return policy


def make_prompts(*lens: int) -> list[Prompt]:
    generator = torch.Generator().manual_seed(sum(lens))
    ids = [tuple(torch.randint(4, NUM_VOCAB, (n,), generator=generator).tolist()) for n in lens]
    return [
        Prompt(prompt_id=i, token_ids=ids_of, task="t", representation="r", payload=None)
        for i, ids_of in enumerate(ids)
    ]


def make_sampling(max_new_tok: int = 60, samples: int = 4, temperature: float = 1.0) -> Sampling:
    return Sampling(
        temperature=temperature, max_new_tok=max_new_tok, samples_per_prompt=samples, stop_ids=(STOP,), seed=0
    )


def plain_logprob(policy: Policy, prompt: Prompt, rollout: Rollout, temperature: float) -> torch.Tensor:
    """By transformers' own forward over prompt and response, no cache, nothing shared."""
    model = transformers_twin(policy)
    with torch.no_grad():
        ids = torch.tensor([*prompt.token_ids, *rollout.token_ids.tolist()])
        logprob_TV = (model(input_ids=ids[None]).logits[0] / temperature).log_softmax(-1)
    rows = logprob_TV[len(prompt.token_ids) - 1 : -1]
    return rows[torch.arange(len(rows)), rollout.token_ids]


# -- a rollout's fields
def several_turns() -> Rollout:
    logprob = torch.tensor([-1.0, -2.0, torch.nan, torch.nan, -3.0, -4.0, torch.nan, -5.0])
    return Rollout(
        prompt_id=0,
        sample=0,
        token_ids=torch.tensor([5, STOP, 7, 8, 9, STOP, 11, STOP]),
        sampler_logprob=logprob,
        finish="stop",
        policy_version=0,
        context_mask=torch.tensor([False, False, True, True, False, False, True, False]),
        environment_reward=0.25,
        num_turns=3,
        environment_failure="timeouts",
    )


def test_a_rollout_counts_what_the_model_wrote() -> None:
    rollout = several_turns()
    assert [turn.tolist() for turn in rollout.turns] == [[5, STOP], [9, STOP], [STOP]]
    assert (rollout.num_model_tok, rollout.num_loss_tok) == (5, 5)
    assert response_text(str, rollout) == f"[5, {STOP}]\n[9, {STOP}]\n[{STOP}]"
    greedy = replace(rollout, sampler_logprob=None)
    assert (greedy.num_model_tok, greedy.num_loss_tok) == (5, 5)
    single = replace(rollout, context_mask=None, sampler_logprob=None)
    assert [turn.tolist() for turn in single.turns] == [rollout.token_ids.tolist()]
    assert (single.num_model_tok, single.num_loss_tok) == (8, 8)


@pytest.mark.parametrize("scored", [True, False])
def test_the_environments_tokens_are_in_the_sequence_and_no_targets(scored: bool) -> None:
    rollout = several_turns() if scored else replace(several_turns(), sampler_logprob=None)
    prompt = make_prompts(3)[0]
    batch = pack_parts([Part(prompt, (rollout,), (1.0,))], CPU)
    assert batch.token_ids.tolist() == [*prompt.token_ids, *rollout.token_ids[:-1].tolist()]
    assert batch.target_ids.tolist() == [5, STOP, 9, STOP, STOP]
    assert batch.row_index.tolist() == [2, 3, 6, 7, 9]  # each is the row of the token before it
    group = Group(prompt=prompt, rollouts=(rollout,) * 2, rewards=(1.0, 0.0), advantages=(1.0, -1.0))
    (update,) = pack(
        [group],
        micro_batch_tok=100,
        prompts_per_update=None,
        objective=ObjectiveConfig(name="dr_grpo" if scored else "sft"),
        device=CPU,
    )
    assert (update.num_loss_tok, update.num_dropped_tok) == (10, 0)


def test_turns_come_back_from_a_checkpoint() -> None:
    single = replace(several_turns(), context_mask=None, environment_reward=None, num_turns=1, environment_failure=None)
    scored = ScoredRollouts(rollouts=(single, several_turns()), texts=("a", "b"), scores=Scores(rewards=(0.0, 1.0)))
    one, several = join_scored(*split_scored(scored)).rollouts
    assert (one.context_mask, one.environment_reward, one.num_turns) == (None, None, 1)
    assert several.context_mask is not None
    assert several.context_mask.tolist() == [False, False, True, True, False, False, True, False]
    assert (several.environment_reward, several.num_turns, several.environment_failure) == (0.25, 3, "timeouts")
    assert count_failures([one, several]) == {"errors": 0, "timeouts": 1, "crashes": 0, "out_of_turns": 0}
    fields, tensors = split_scored(scored)
    for rollout in fields["rollouts"]:  # as versions without turns wrote them
        del rollout["environment_reward"], rollout["num_turns"], rollout["environment_failure"]
    del tensors["context_mask"]
    assert [r.num_turns for r in join_scored(fields, tensors).rollouts] == [1, 1]


def test_every_turn_must_end_with_its_stop_token() -> None:
    rollout = several_turns()
    check_ends([rollout], make_sampling())
    ids = rollout.token_ids.clone()
    ids[1] = 6
    with pytest.raises(RunFailed, match="every turn before the last must end with its stop token"):
        check_ends([replace(rollout, token_ids=ids)], make_sampling())


# -- the built-in sampler
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_of_three_turns_are_those_of_a_plain_forward(temperature: float) -> None:
    policy, prompts, sampling = make_policy(), make_prompts(5, 1, 9), make_sampling(temperature=temperature)
    dialogue = Echo()
    rollouts = BuiltinSampler(policy, SamplerConfig(max_seqs=5)).generate(prompts, sampling, dialogue=dialogue)
    assert not dialogue.open
    assert sum(r.num_turns == 3 for r in rollouts) >= 4
    check_ends(rollouts, sampling)
    for i, rollout in enumerate(rollouts):
        prompt = prompts[i // 4]
        assert [t.tolist() for t in rollout.turns][: rollout.num_turns] == [
            turn for turn in dialogue.heard[prompt.prompt_id, rollout.sample]
        ] + ([rollout.turns[-1].tolist()] if rollout.finish == "length" else [])
        assert rollout.sampler_logprob is not None
        assert (rollout.environment_reward is not None) == (rollout.num_turns == 3 and rollout.finish == "stop")
        own = rollout.is_target
        assert own is not None if rollout.num_turns > 1 else True
        truth = plain_logprob(policy, prompt, rollout, temperature).float()
        own = torch.ones(len(truth), dtype=torch.bool) if rollout.context_mask is None else ~rollout.context_mask
        torch.testing.assert_close(rollout.sampler_logprob[own], truth[own], rtol=0, atol=2e-6)
        assert rollout.sampler_logprob[~own].isnan().all()


@pytest.mark.parametrize("steps_between", [1, 8])
def test_stop_strings_end_turns(monkeypatch: pytest.MonkeyPatch, steps_between: int) -> None:
    monkeypatch.setitem(builtin.STEPS_BETWEEN_CHECKS, "cpu", steps_between)
    policy, prompts, stop = make_policy(), make_prompts(5, 9), ("wc wd", "we", "wk")
    sampling, dialogue = replace(make_sampling(), stop=stop), Echo(num_tok=9)
    rollouts = BuiltinSampler(policy, SamplerConfig(max_seqs=5)).generate(prompts, sampling, dialogue=dialogue)
    check_ends(rollouts, sampling)
    by_string = 0
    for i, rollout in enumerate(rollouts):
        for turn in map(torch.Tensor.tolist, rollout.turns[: -1 if rollout.finish == "length" else None]):
            end = first_end(policy.text, stop, turn)
            assert end == len(turn) if turn[-1] != STOP else end in (None, len(turn)), turn
            by_string += turn[-1] != STOP
        truth = plain_logprob(policy, prompts[i // 4], rollout, 1.0).float()
        own = torch.ones(len(truth), dtype=torch.bool) if rollout.context_mask is None else ~rollout.context_mask
        assert rollout.sampler_logprob is not None
        torch.testing.assert_close(rollout.sampler_logprob[own], truth[own], rtol=0, atol=2e-6)
    assert by_string > 4 and any(rollout.num_turns == 3 for rollout in rollouts)
    with pytest.raises(RunFailed, match="drops stop tokens, or ignores them"):
        check_ends(rollouts, make_sampling())


@pytest.mark.parametrize("body", ["native", "reference"])
def test_rollouts_do_not_depend_on_how_fast_environments_are(body: str) -> None:
    policy, prompts, sampling = make_policy(torch.float32), make_prompts(5, 3), make_sampling(max_new_tok=24, samples=3)
    drawn = []
    with backend.using(f"decode_attention={body}"):
        for delay_s in (0.0, 0.02):
            sampler = BuiltinSampler(policy, SamplerConfig(max_seqs=3))
            rollouts = sampler.generate(prompts, sampling, dialogue=Echo(delay_s=delay_s))
            assert any(r.num_turns > 1 for r in rollouts)
            drawn.append([(r.token_ids.tolist(), str(r.sampler_logprob), r.environment_reward) for r in rollouts])
    assert drawn[0] == drawn[1]


def test_replies_may_be_taken_as_soon_as_they_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU."""

    def untimed(dialogue: Echo, max_new_tok: int, *, is_timed: bool) -> Conversations:
        return Conversations(dialogue, max_new_tok, is_timed=False)

    monkeypatch.setattr(builtin, "Conversations", untimed)
    policy, prompts, sampling = make_policy(), make_prompts(5, 2), make_sampling()
    dialogue = Echo(delay_s=0.02)
    rollouts = BuiltinSampler(policy, SamplerConfig(max_seqs=5)).generate(prompts, sampling, dialogue=dialogue)
    check_ends(rollouts, sampling)
    assert len(rollouts) == 8 and any(r.num_turns == 3 for r in rollouts) and not dialogue.open
    size = sampling.samples_per_prompt
    truth = [plain_logprob(policy, prompts[i // size], r, 1.0).float() for i, r in enumerate(rollouts)]
    for rollout, logprob in zip(rollouts, truth, strict=True):
        assert rollout.sampler_logprob is not None
        own = rollout.sampler_logprob.isfinite()
        torch.testing.assert_close(rollout.sampler_logprob[own], logprob[own], rtol=0, atol=2e-6)


def test_what_does_not_fit_ends_the_rollout() -> None:
    policy, prompts, sampling = make_policy(torch.float32), make_prompts(5), make_sampling(max_new_tok=20, samples=16)
    dialogue = Echo(turns=1000)
    rollouts = BuiltinSampler(policy, SamplerConfig()).generate(prompts, sampling, dialogue=dialogue)
    check_ends(rollouts, sampling)
    assert max(len(r.token_ids) for r in rollouts) <= 20
    assert any(r.finish == "stop" for r in rollouts) and any(r.num_turns > 2 for r in rollouts)
    assert all(r.environment_reward is None for r in rollouts)
    assert not dialogue.open


def test_greedy_turns_have_no_log_probabilities() -> None:
    prompts, sampling = make_prompts(5, 2), make_sampling(samples=1, temperature=0.0)
    rollouts = BuiltinSampler(make_policy(torch.float32), SamplerConfig()).generate(prompts, sampling, dialogue=Echo())
    assert all(r.sampler_logprob is None for r in rollouts)


def test_a_stop_ends_the_environments_that_are_open() -> None:
    dialogue, calls = Echo(delay_s=0.05), []

    def stop() -> None:
        calls.append(0)
        if len(calls) > 30:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sampler = BuiltinSampler(make_policy(torch.float32), SamplerConfig())
        sampler.generate(make_prompts(5), make_sampling(), on_step=stop, dialogue=dialogue)
    assert not dialogue.open


def test_others_are_decoded_while_one_waits() -> None:
    """The first environment that is asked replies when others have been asked."""
    held: list[Future[Reply]] = []
    asked: list[int] = []
    waits = 0

    class Held(Echo):
        def turn(self, prompt: Prompt, sample: int, token_ids: Sequence[int], start: int) -> Future[Reply]:
            asked.append(sample)
            if not held:
                held.append(Future())
                return held[0]
            return super().turn(prompt, sample, token_ids, start)

    def on_step() -> None:
        nonlocal waits
        waits += 1
        assert waits < 1000, "the sampler waits for one environment alone"
        if len(asked) >= 3 and not held[0].done():
            held[0].set_result(Reply(token_ids=(7, 8)))

    sampler = BuiltinSampler(make_policy(torch.float32), SamplerConfig())
    rollouts = sampler.generate(make_prompts(5), make_sampling(samples=8), on_step=on_step, dialogue=Held())
    assert len(rollouts) == 8


class Hanging(Echo):
    """Replies to the first turn of prompt 0, sample 1 when all other prompts are done, and to all else at once."""

    def __init__(self) -> None:
        super().__init__(turns=3)
        self.hangs: Future[Reply] = Future()
        self.events: list[str] = []

    def turn(self, prompt: Prompt, sample: int, token_ids: Sequence[int], start: int) -> Future[Reply]:
        reply = super().turn(prompt, sample, token_ids, start)
        if (prompt.prompt_id, sample) != (0, 1) or len(self.heard[0, 1]) > 1:
            return reply
        self.events.append("hangs")
        self.after = reply.result()
        return self.hangs


def test_a_hanging_environment_does_not_stop_the_decoding_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "PATIENCE_S", 0.1)
    policy, prompts, echo = make_policy(), make_prompts(5, 9, 7), Hanging()
    polls = 0

    def on_group(index: int, rollouts: Sequence[Rollout]) -> None:
        echo.events.append(f"done {index}")
        if index != 0 and echo.events.count("done 1") + echo.events.count("done 2") == 2:
            echo.hangs.set_result(echo.after)

    def on_step() -> None:  # sampling that waits for it would wait for ever
        nonlocal polls
        polls += 1
        assert polls < 500 or echo.hangs.done()

    sampler = BuiltinSampler(policy, SamplerConfig(max_seqs=6))
    rollouts = sampler.generate(prompts, make_sampling(), on_group, on_step, dialogue=echo)
    assert sorted(echo.events[1:3]) == ["done 1", "done 2"] and echo.events[3] == "done 0"
    alone = BuiltinSampler(policy, SamplerConfig(max_seqs=6)).generate(prompts, make_sampling(), dialogue=Echo(turns=3))
    for rollout, other in zip(rollouts, alone, strict=True):  # the late one, too, is what it would have been
        assert torch.equal(rollout.token_ids, other.token_ids)
        torch.testing.assert_close(rollout.sampler_logprob, other.sampler_logprob, equal_nan=True)
