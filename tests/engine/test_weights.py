"""The layout of fused tensors, fingerprints, and the tripwire; on tiny models and in-process samplers."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence

import pytest
import torch
from truth import causal

from isomorph.engine.config import SamplerConfig, TinyModel
from isomorph.engine.model.load import build_tiny
from isomorph.engine.model.policy import Policy
from isomorph.engine.model.scoring import trainer_logprob
from isomorph.engine.rollout.builtin import BuiltinSampler
from isomorph.engine.rollout.fingerprint import fingerprint, storage_fingerprint, tensor_hash, tensor_hashes
from isomorph.engine.rollout.tripwire import check_publication
from isomorph.engine.rollout.weights import SamplerTensor, sampler_tensors, split_rows
from isomorph.engine.types import OnGroup, OnStep, Prompt, Publication, Rollout, RunFailed, Sampling

WORDS = [f"w{chr(97 + i)}" for i in range(26)]
LAYER = "model.layers.3.self_attn"


def make_policy(seed: int = 0) -> Policy:
    tiny = TinyModel(hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=64, max_model_len=64)
    return build_tiny(tiny, WORDS, seed=seed, dtype=torch.float32, device=torch.device("cpu"))


def make_prompts(policy: Policy, num: int = 3) -> list[Prompt]:
    texts = [" ".join(WORDS[i : i + 4 + i]) for i in range(num)]
    return [
        Prompt(prompt_id=i, token_ids=policy.text.encode_prompt(t), task="t", representation="code", payload=None)
        for i, t in enumerate(texts)
    ]


# -- layout
def test_query_key_and_value_stand_in_one_tensor_whatever_their_order() -> None:
    names = [f"{LAYER}.{m}_proj.weight" for m in ("v", "o", "k", "q")]
    found = sampler_tensors(names)
    assert SamplerTensor(f"{LAYER}.qkv_proj.weight", (names[3], names[2], names[0])) in found
    assert SamplerTensor(f"{LAYER}.o_proj.weight", (names[1],)) in found
    assert len(found) == 2


def test_biases_and_norms_find_their_place() -> None:
    biases = [f"{LAYER}.{m}_proj.bias" for m in ("q", "k", "v")]
    mlp = ["model.layers.3.mlp.gate_proj.weight", "model.layers.3.mlp.up_proj.weight"]
    alone = [f"{LAYER}.q_norm.weight", f"{LAYER}.k_norm.weight", "model.norm.weight", "lm_head.weight"]
    assert {s.name: s.parts for s in sampler_tensors([*biases, *mlp, *alone])} == {
        f"{LAYER}.qkv_proj.bias": tuple(biases),
        "model.layers.3.mlp.gate_up_proj.weight": tuple(mlp),
        **{name: (name,) for name in alone},
    }


def test_a_missing_part_is_refused() -> None:
    with pytest.raises(ValueError, match="no k_proj, v_proj"):
        sampler_tensors([f"{LAYER}.q_proj.weight"])


def test_split_rows_gives_views_and_leaves_padding_out() -> None:
    whole = torch.arange(20.0).view(10, 2)
    views = split_rows(whole, SamplerTensor("x", ("a", "b")), {"a": 6, "b": 4})
    assert torch.equal(views["b"], whole[6:])
    assert views["b"].data_ptr() == whole[6:].data_ptr()
    padded = split_rows(whole, SamplerTensor("embed", ("embed",)), {"embed": 7})
    assert padded["embed"].shape == (7, 2)


@pytest.mark.parametrize(("parts", "rows"), [(("a",), 11), (("a", "b"), 6), (("a", "b"), 4)])
def test_split_rows_refuses_rows_that_do_not_fit(parts: tuple[str, ...], rows: int) -> None:
    with pytest.raises(ValueError, match="rows of"):
        split_rows(torch.zeros(10, 2), SamplerTensor("x", parts), dict.fromkeys(parts, rows))


# -- fingerprint
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(48, 40), (7,), (33, 65), (1,)])
def test_every_single_bit_changes_the_hash(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = tensor_hash(tensor)
    bits = tensor.view(torch.int32 if dtype == torch.float32 else torch.int16).view(-1)
    for index in {0, len(bits) // 2, len(bits) - 1}:
        for bit in (0, 7, 8 * dtype.itemsize - 2):
            bits[index] ^= 1 << bit
            assert tensor_hash(tensor) != before, (index, bit)
            bits[index] ^= 1 << bit
    assert tensor_hash(tensor) == before


def test_swapped_rows_change_the_hash() -> None:
    tensor = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    for i, j in [(0, 1), (0, 63), (10, 42), (0, 32)]:
        swapped = tensor.clone()
        swapped[[i, j]] = tensor[[j, i]]
        assert tensor_hash(swapped) != tensor_hash(tensor), (i, j)


def test_the_hash_does_not_depend_on_where_a_tensor_lies() -> None:
    tensor = torch.randn(10, 7, generator=torch.Generator().manual_seed(0))
    for offset in (1, 2, 3):
        elsewhere = torch.zeros(100)[offset : offset + 70].view(10, 7)
        elsewhere.copy_(tensor)
        assert tensor_hash(elsewhere) == tensor_hash(tensor)
    assert tensor_hash(tensor.T.contiguous().T) == tensor_hash(tensor)


def test_the_fingerprint_depends_on_names_shapes_and_dtypes() -> None:
    a, b = torch.ones(32), torch.zeros(32)
    prints = [
        fingerprint({"a": a, "b": b}),
        fingerprint({"a": b, "b": a}),
        fingerprint({"a": a.view(4, 8), "b": b}),
        fingerprint({"a": a, "b": b.bfloat16()}),
    ]
    assert len(set(prints)) == 4
    assert fingerprint({"b": b, "a": a}) == prints[0]


def test_the_fingerprint_of_storage_is_that_of_places() -> None:
    a, b = torch.ones(4, 8), torch.ones(4, 8)
    here = storage_fingerprint({"a": a, "b": b})
    assert storage_fingerprint({"b": b.view(4, 8), "a": a[:]}) == here
    moved = [{"a": a.clone(), "b": b}, {"a": b, "b": a}, {"a": a.T, "b": b}, {"a": a.view(8, 4), "b": b}, {"a": a}]
    assert here not in map(storage_fingerprint, moved)
    a.add_(1)  # in place, so both sides see it
    assert storage_fingerprint({"a": a, "b": b}) == here


def test_many_hashes_at_once_are_those_of_each() -> None:
    named = {"a": torch.randn(33, 65), "b": torch.randn(7).bfloat16(), "c": torch.arange(12.0).double()}
    assert tensor_hashes(named) == {name: tensor_hash(tensor) for name, tensor in named.items()}
    assert tensor_hashes({}) == {}


# -- the trainer's log-probabilities
def test_trainer_logprob_is_that_of_every_sequence_alone() -> None:
    policy = make_policy()
    prompts = make_prompts(policy)
    sampling = Sampling(temperature=0.7, max_new_tok=9, samples_per_prompt=3, stop_ids=policy.text.stop_ids, seed=1)
    rollouts = BuiltinSampler(policy, SamplerConfig()).generate(prompts, sampling)
    prompt_of = {p.prompt_id: p for p in prompts}
    for rollout, logprob in zip(rollouts, trainer_logprob(policy, prompts, rollouts, temperature=0.7), strict=True):
        prompt = prompt_of[rollout.prompt_id].token_ids
        token_ids = torch.tensor([*prompt, *rollout.token_ids.tolist()])
        with torch.no_grad():
            hidden = policy.backbone(token_ids[None], torch.arange(len(token_ids))[None], causal)[0]
            all_TV = torch.log_softmax(hidden @ policy.unembedding.T / 0.7, -1)
        alone = all_TV[len(prompt) - 1 : -1].gather(1, rollout.token_ids[:, None])[:, 0]
        assert logprob.shape == rollout.token_ids.shape
        assert (logprob - alone).abs().max() < 1e-5


# -- the tripwire
class CopyingSampler:
    """Has weights of its own and copies them at each publish."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.twin = make_policy(seed=99)
        self.inner = BuiltinSampler(self.twin, SamplerConfig())
        self.publish(0)

    @property
    def policy_version(self) -> int:
        return self.inner.policy_version

    @policy_version.setter
    def policy_version(self, version: int) -> None:
        self.inner.policy_version = version

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        on_group: OnGroup | None = None,
        on_step: OnStep | None = None,
    ) -> list[Rollout]:
        return self.inner.generate(prompts, sampling, on_group, on_step)

    @contextlib.contextmanager
    def asleep(self) -> Iterator[None]:
        yield

    def publish(self, version: int) -> Publication:
        self.twin.overwrite(self.policy.snapshot())
        self.policy_version = version
        return self.say(version)

    def say(self, version: int) -> Publication:
        return Publication(version=version, num_bytes=1, fingerprint=fingerprint(self.twin.named_parameters()))


def test_an_honest_publication_passes() -> None:
    policy = make_policy()
    prompt = make_prompts(policy)[2]
    sampler = CopyingSampler(policy)
    proven = check_publication(policy, sampler, sampler.publish(1), prompt, None)
    assert proven.version == 1 and proven.fingerprint_s > 0 and proven.probe_s > 0
    builtin = BuiltinSampler(policy, SamplerConfig())
    check_publication(policy, builtin, builtin.publish(1), prompt, None)


def test_a_sampler_that_says_shared_and_has_storage_of_its_own_is_caught() -> None:
    policy = make_policy()
    shared = Publication(version=0, num_bytes=0, fingerprint=storage_fingerprint(policy.named_parameters()))
    sampler, prompt = BuiltinSampler(policy, SamplerConfig()), make_prompts(policy)[0]
    check_publication(policy, sampler, shared, prompt, None)
    weight = policy.named_parameters()["model.layers.1.mlp.down_proj.weight"]
    weight.data = weight.data.clone()  # the same bits, for now
    with pytest.raises(RunFailed, match="stale weights"):
        check_publication(policy, sampler, shared, prompt, None)


def test_one_tensor_left_behind_by_one_bit_is_caught() -> None:
    policy = make_policy()
    sampler = CopyingSampler(policy)
    sampler.publish(1)
    with torch.no_grad():
        weight = policy.named_parameters()["model.layers.1.mlp.down_proj.weight"]
        weight.view(torch.int32)[0, 0] ^= 1
    with pytest.raises(RunFailed, match="stale weights"):
        check_publication(policy, sampler, sampler.say(1), make_prompts(policy)[0], None)


def test_a_sampler_that_computes_with_other_weights_than_it_shows_is_caught() -> None:
    policy = make_policy()
    sampler = CopyingSampler(policy)
    publication = sampler.publish(1)
    with torch.no_grad():
        sampler.twin.named_parameters()["model.norm.weight"].mul_(1.5)
    with pytest.raises(RunFailed, match="does not compute with the trainer's weights"):
        check_publication(policy, sampler, publication, make_prompts(policy)[0], None)


def test_a_sampler_of_another_version_is_caught() -> None:
    policy = make_policy()
    sampler = BuiltinSampler(policy, SamplerConfig())
    publication = sampler.publish(4)
    sampler.policy_version = 3
    with pytest.raises(RunFailed, match="version is 4, the sampler's 3"):
        check_publication(policy, sampler, publication, make_prompts(policy)[0], None)


def test_a_probe_that_is_not_finite_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = make_policy()
    sampler = BuiltinSampler(policy, SamplerConfig())

    def without_numbers(prompts: Sequence[Prompt], sampling: Sampling) -> list[Rollout]:
        drawn = BuiltinSampler(policy, SamplerConfig()).generate(prompts, sampling)
        return [dataclasses.replace(r, sampler_logprob=torch.full(r.token_ids.shape, torch.nan)) for r in drawn]

    monkeypatch.setattr(sampler, "generate", without_numbers)
    with pytest.raises(RunFailed, match="not finite"):
        check_publication(policy, sampler, sampler.publish(1), make_prompts(policy)[0], None)


def test_the_probe_fits_wherever_its_prompt_fits() -> None:
    policy = make_policy()
    prompt = Prompt(prompt_id=0, token_ids=(5,) * 63, task="t", representation="code", payload=None)
    sampler = BuiltinSampler(policy, SamplerConfig())
    check_publication(policy, sampler, sampler.publish(1), prompt, None)
