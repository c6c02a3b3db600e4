"""Every loss against TRL 1.16's own loss function, on the same model and tensors: value, and gradient of every weight.

``pytest -s`` prints the largest difference for each. Where TRL means something else by design:

- its denominators are those of a micro-batch, ours those of an optimizer step: compared on one micro-batch;
- it multiplies the loss's KL by the ratio (DeepSeek-V3.2) unless use_bias_correction_kl is off; GRPO's paper does not;
- its CISPO bounds the ratio by epsilon_high, ours by 1 + clip_high;
- its REINFORCE++ and rejection-sampled fine-tuning do not exist: the clipped token loss with whitened advantages, and
  SFT's on the accepted responses, are what they are made of.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from small_world import one_thread  # noqa: F401
from test_trl_adapter import GROUPS, NUM_VOCAB, WORDS, model_of, trainer_of
from torch import Tensor

from isomorph.engine.config import ObjectiveConfig, Stage
from isomorph.engine.model.text import word_tokenizer
from isomorph.engine.types import Group, Prompt, Rollout, Scores
from isomorph.engine.update.advantage import penalised
from isomorph.engine.update.micro_batches import pack
from isomorph.engine.update.objective import LossFunction, TokenInputs, loss_of_tokens, token_weight
from isomorph.engine.update.score import score
from isomorph.kernels.linear_logprob import TokenStats

TEMPERATURE = 0.7
BOUND = 1e-12  # float64
FLOAT32_BOUND = 1e-6  # SFT's log-probabilities come out of TRL's fused head, which is float32
MAX_NEW_TOK = 9
ADVANTAGES = (1.3, -0.7, -1.9, 0.4, 0.8, -1.1)


def batch_of_trl(noise: float = 0.3) -> dict[str, Tensor]:
    """What its trainers hand to their losses: prompts padded on the left, completions on the right."""
    generator = torch.Generator().manual_seed(1)
    rows = [(num_prompt, n) for num_prompt, lens in GROUPS for n in lens]
    width, longest = max(p for p, _ in rows), max(n for _, n in rows)
    batch = {
        "prompt_ids": torch.randint(2, NUM_VOCAB, (len(rows), width), generator=generator),
        "prompt_mask": torch.stack([(torch.arange(width) >= width - p).long() for p, _ in rows]),
        "completion_ids": torch.randint(2, NUM_VOCAB, (len(rows), longest), generator=generator),
        "completion_mask": torch.stack([(torch.arange(longest) < n).long() for _, n in rows]),
        "advantages": torch.tensor(ADVANTAGES, dtype=torch.float64),
    }
    batch["num_items_in_batch"] = batch["completion_mask"].sum()
    for name in ("old", "ref", "sampler"):
        batch[name] = noise * torch.randn(len(rows), longest, generator=generator, dtype=torch.float64)
    return batch


def stats_of(model: Any, batch: dict[str, Tensor], temperature: float) -> tuple[TokenStats, Tensor]:
    """Of the completions' tokens, from transformers' logits, and each one's sequence."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    start, keeps = batch["prompt_ids"].shape[1], batch["completion_mask"].bool()
    logits = model(input_ids=ids, attention_mask=mask).logits[:, start - 1 : -1] / temperature
    logprob_NV, target = logits[keeps].log_softmax(-1), batch["completion_ids"][keeps]
    entropy = -(logprob_NV.exp() * logprob_NV).sum(-1)
    seq_id = torch.arange(len(ids))[:, None].expand_as(keeps)[keeps]
    return TokenStats(logprob_NV.gather(1, target[:, None])[:, 0], entropy, logits[keeps].logsumexp(-1)), seq_id


def filled(batch: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """With log-probabilities of an old policy, a reference and a sampler, each some way off the present one."""
    keeps = batch["completion_mask"].bool()
    with torch.no_grad():
        now = torch.zeros(keeps.shape, dtype=torch.float64).masked_scatter(
            keeps, stats_of(model, batch, TEMPERATURE)[0].logprob.double()
        )
    old, ref = (now + batch[name] for name in ("old", "ref"))
    return {
        **batch,
        "old_per_token_logps": old,
        "old_logps": (old * keeps).sum(1),
        "ref_per_token_logps": ref,
        "sampling_per_token_logps": old + batch["sampler"],
    }


def our_loss(o: ObjectiveConfig, model: Any, batch: dict[str, Tensor], loss: LossFunction = loss_of_tokens) -> Tensor:
    keeps = batch["completion_mask"].bool()
    stage = Stage(
        name="s",
        steps=1,
        objective=o,
        sampling=dict(temperature=TEMPERATURE, samples_per_prompt=1 if o.is_supervised else 2),  # type: ignore[arg-type]
    )
    stats, seq_id = stats_of(model, batch, stage.loss_temperature)
    accepted = (batch["advantages"] != 0) if o.name == "rft" else torch.ones(len(keeps), dtype=torch.bool)
    weight = token_weight(
        o,
        seq_id,
        len(keeps),
        num_loss_tok=int(keeps[accepted].sum()),
        num_step_seqs=int(accepted.sum()),
        max_new_tok=MAX_NEW_TOK,
        dtype=torch.float64,
    )
    rows = TokenInputs(
        weight=weight,
        advantage=batch["advantages"][seq_id],
        seq_id=seq_id,
        old_logprob=batch["old_per_token_logps"][keeps],
        ref_logprob=batch["ref_per_token_logps"][keeps] if o.kl_coef else None,
        sampler_logprob=batch["sampling_per_token_logps"][keeps],
    )
    return (weight * loss(o, stats, rows).loss).sum()


def opened(folder: Path, kind: Any = trl.GRPOTrainer, **options: Any) -> tuple[Any, Any]:
    """A trainer and its model, in float64; the log-probabilities that it takes are not rounded to float32."""
    model_of().save_pretrained(folder / "model")
    trainer = trainer_of(folder, str(folder / "model"), kind, temperature=TEMPERATURE, **options)
    model = trainer.model.double().train()

    def exact(model: Any, ids: Tensor, mask: Tensor, num_kept: int, **_: Any) -> tuple[Tensor, Tensor, None]:
        batch = dict(prompt_ids=ids[:, :-num_kept], prompt_mask=mask[:, :-num_kept])
        batch |= dict(completion_ids=ids[:, -num_kept:], completion_mask=mask[:, -num_kept:])
        stats, _ = stats_of(model, batch, TEMPERATURE)
        keeps, nothing = batch["completion_mask"].bool(), torch.zeros(len(ids), num_kept, dtype=torch.float64)
        return nothing.masked_scatter(keeps, stats.logprob), nothing.masked_scatter(keeps, stats.entropy), None

    trainer._get_per_token_logps_and_entropies = exact
    return trainer, model


def with_gradient(model: Any, loss: Tensor) -> tuple[Tensor, Tensor]:
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return loss.detach(), torch.cat([g.flatten() for g in gradients])


def report(name: str, ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor], bound: float = BOUND) -> None:
    apart = [float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True)]
    norm = float(theirs[1].norm())
    print(
        f"\n{name:28} loss {float(theirs[0]):+.4f} differs by {apart[0]:.1e}  gradient by {apart[1]:.1e} of {norm:.2f}"
    )
    assert norm > 1e-3 and max(apart) < bound, name


CLIP = dict(epsilon=0.1, epsilon_high=0.2)
KL = dict(beta=0.2, use_bias_correction_kl=False)
TIS = dict(vllm_importance_sampling_correction=True, vllm_importance_sampling_clip_max=1.2)
OUR_CLIP = dict(clip_low=0.1, clip_high=0.2)
OUR_TIS = dict(importance_sampling_cap=1.2)
BOTH, OUR_BOTH = dict(**TIS, vllm_importance_sampling_clip_min=0.9), dict(**OUR_TIS, importance_sampling_floor=0.9)
GRPO_LOSSES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "grpo": (dict(loss_type="grpo", **CLIP), dict(name="grpo", **OUR_CLIP)),
    "grpo, k3": (dict(loss_type="grpo", **CLIP, **KL), dict(name="grpo", kl_coef=0.2, **OUR_CLIP)),
    "dr_grpo": (dict(loss_type="dr_grpo", **CLIP), dict(name="dr_grpo", **OUR_CLIP)),
    "dr_grpo, k3": (dict(loss_type="dr_grpo", **CLIP, **KL), dict(name="dr_grpo", kl_coef=0.2, **OUR_CLIP)),
    "dapo": (dict(loss_type="dapo", epsilon=0.2, epsilon_high=0.28), dict(name="dapo")),
    "grpo, delta": (dict(loss_type="grpo", delta=1.3, **CLIP), dict(name="grpo", clip_dual=1.3, **OUR_CLIP)),
    "dapo, entropy": (
        dict(loss_type="dapo", **CLIP, entropy_coef=0.03),
        dict(name="dapo", entropy_coef=0.03, **OUR_CLIP),
    ),
    "gspo": (
        dict(loss_type="grpo", importance_sampling_level="sequence", epsilon=3e-4, epsilon_high=4e-4),
        dict(name="gspo"),
    ),
    "gspo, wide clip": (
        dict(loss_type="grpo", importance_sampling_level="sequence", **CLIP),
        dict(name="gspo", **OUR_CLIP),
    ),
    "cispo": (dict(loss_type="cispo", epsilon_high=5.0), dict(name="cispo")),
    "cispo, narrow": (dict(loss_type="cispo", epsilon_high=1.2), dict(name="cispo", clip_high=0.2)),
    "reinforce_pp": (dict(loss_type="dapo", epsilon=0.2), dict(name="reinforce_pp")),
    "dapo, tis token": (
        dict(loss_type="dapo", **CLIP, **TIS, vllm_importance_sampling_mode="token_truncate"),
        dict(name="dapo", importance_sampling="token", **OUR_CLIP, **OUR_TIS),
    ),
    "dapo, tis token mask, k3": (
        dict(loss_type="dapo", **CLIP, **TIS, **KL, vllm_importance_sampling_mode="token_mask"),
        dict(
            name="dapo",
            importance_sampling="token",
            importance_sampling_mode="mask",
            kl_coef=0.2,
            **OUR_CLIP,
            **OUR_TIS,
        ),
    ),
    "dapo, tis token, both bounds": (
        dict(loss_type="dapo", **CLIP, **BOTH, vllm_importance_sampling_mode="token_truncate"),
        dict(name="dapo", importance_sampling="token", **OUR_CLIP, **OUR_BOTH),
    ),
    "grpo, tis sequence mask, both bounds": (
        dict(loss_type="grpo", **CLIP, **BOTH, vllm_importance_sampling_mode="sequence_mask"),
        dict(name="grpo", importance_sampling="sequence", importance_sampling_mode="mask", **OUR_CLIP, **OUR_BOTH),
    ),
    "grpo, tis sequence": (
        dict(loss_type="grpo", **CLIP, **TIS, vllm_importance_sampling_mode="sequence_truncate"),
        dict(name="grpo", importance_sampling="sequence", **OUR_CLIP, **OUR_TIS),
    ),
    "grpo, tis sequence mask": (
        dict(loss_type="grpo", **CLIP, **TIS, vllm_importance_sampling_mode="sequence_mask"),
        dict(name="grpo", importance_sampling="sequence", importance_sampling_mode="mask", **OUR_CLIP, **OUR_TIS),
    ),
}


def trl_tis(batch: dict[str, Tensor], mode: str, low: float) -> Tensor:
    """TRL computes it while it draws; the formula of its documentation."""
    log_weight = (batch["old_per_token_logps"] - batch["sampling_per_token_logps"]) * batch["completion_mask"]
    if mode.startswith("sequence"):
        log_weight = log_weight.sum(1, keepdim=True)
    weight = log_weight.exp()
    if mode.endswith("truncate"):
        return weight.clamp(low, 1.2)
    return weight.masked_fill((weight < low) | (weight > 1.2), 0.0)


@pytest.mark.parametrize("name", GRPO_LOSSES)
def test_a_loss_is_that_of_trls_grpo_trainer(tmp_path: Path, name: str) -> None:
    options, choices = GRPO_LOSSES[name]
    mode = options.get("vllm_importance_sampling_mode")
    trainer, model = opened(tmp_path, max_completion_length=MAX_NEW_TOK, **{"beta": 0.0, **options})
    trainer.current_gradient_accumulation_steps = trainer.args.steps_per_generation  # as in its first micro-batch
    assert trainer.current_gradient_accumulation_steps == 1
    batch = filled(batch_of_trl(), model)
    if mode:  # the correction hangs on vLLM, which drew nothing here
        trainer.use_vllm = True
        batch["importance_sampling_ratio"] = trl_tis(batch, mode, options.get("vllm_importance_sampling_clip_min", 0.0))
    theirs = with_gradient(model, trainer._compute_loss(model, batch))
    report(name, with_gradient(model, our_loss(ObjectiveConfig(**choices), model, batch)), theirs)


def test_the_own_objective_of_the_examples_is_trls_sapo(tmp_path: Path) -> None:
    source = (Path(__file__).parents[2] / "examples" / "own_objective.py").read_text()
    space: dict[str, Any] = {}
    exec(source[: source.index("policy = load_policy")], space)  # the function, without the run
    trainer, model = opened(tmp_path, max_completion_length=MAX_NEW_TOK, beta=0.0, loss_type="sapo")
    trainer.current_gradient_accumulation_steps = 1
    batch = filled(batch_of_trl(), model)
    theirs = with_gradient(model, trainer._compute_loss(model, batch))
    report("sapo", with_gradient(model, our_loss(ObjectiveConfig(name="grpo"), model, batch, space["sapo"])), theirs)


@pytest.mark.parametrize(("low", "high"), [(0.2, 0.2), (0.05, 0.1)])
def test_rloo_is_that_of_trls_rloo_trainer(tmp_path: Path, low: float, high: float) -> None:
    trainer, model = opened(tmp_path, trl.RLOOTrainer, epsilon=low, epsilon_high=high)
    batch = filled(batch_of_trl(), model)
    theirs = with_gradient(model, trainer._compute_loss(model, batch))
    o = ObjectiveConfig(name="rloo", clip_low=low, clip_high=high)
    report(f"rloo, clip {low} {high}", with_gradient(model, our_loss(o, model, batch)), theirs)


@pytest.mark.parametrize("name", ["sft", "rft"])
def test_imitation_is_that_of_trls_sft_trainer(tmp_path: Path, name: Any) -> None:
    """Without the sampling temperature. rft: of the accepted responses, each worth 1."""
    args = trl.SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", disable_tqdm=True)
    data = Dataset.from_dict({"text": [" ".join(WORDS[:4])] * 2})
    trainer = trl.SFTTrainer(model_of(), args, train_dataset=data, processing_class=word_tokenizer(WORDS))
    model = trainer.model.double().train()
    batch = filled(batch_of_trl(), model)
    accepted = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    batch["advantages"] = accepted if name == "rft" else batch["advantages"]
    keeps = batch["completion_mask"].bool() & (accepted if name == "rft" else torch.ones(6)).bool()[:, None]
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    labels = torch.cat(
        [torch.full_like(batch["prompt_ids"], -100), batch["completion_ids"].masked_fill(~keeps, -100)], 1
    )
    loss = trainer.compute_loss(model, dict(input_ids=ids, attention_mask=mask, labels=labels))
    theirs = with_gradient(model, loss)
    ours = with_gradient(model, our_loss(ObjectiveConfig(name=name), model, batch))
    report(name, ours, theirs, FLOAT32_BOUND)


def step_of_trl(folder: Path, kind: Any, **options: Any) -> tuple[Any, dict[str, Tensor], list[float]]:
    """One step of a trainer, drawn by itself: the trainer, what it made of its completions, and the rewards."""
    model_of().save_pretrained(folder / "model")
    path = str(folder / "model")
    trainer = trainer_of(folder, path, kind, max_steps=1, temperature=TEMPERATURE, learning_rate=0.0, **options)
    seen: list[dict[str, Tensor]] = []
    rewards: list[float] = []
    draw: Callable[..., dict[str, Tensor]] = trainer._generate_and_score_completions
    judge: Callable[..., Tensor] = trainer._calculate_rewards

    def look(inputs: Any) -> dict[str, Tensor]:
        seen.append(draw(inputs))
        return dict(seen[0])

    def listen(inputs: Any, prompts: Any, completions: Any, ids: list[list[int]]) -> Tensor:
        worth = judge(inputs, prompts, completions, ids)
        worth[:, 0] = torch.tensor([float(sum(tokens) % 5) for tokens in ids])
        rewards.extend(worth[:, 0].tolist())
        return worth

    trainer._generate_and_score_completions, trainer._calculate_rewards = look, listen
    if trainer.ref_model is not None:  # or the KL to it would be zero
        generator = torch.Generator().manual_seed(5)
        for p in trainer.ref_model.parameters():
            p.data += 0.3 * torch.randn(p.shape, generator=generator)
    trainer.train()
    (batch,) = seen
    return trainer, batch, rewards


def groups_of(batch: dict[str, Tensor], rewards: list[float], o: ObjectiveConfig) -> list[Group]:
    """The step's completions, four to a prompt: rewarded and compared by us."""
    rows = [
        (row[keeps.bool()], completion[mask.bool()])
        for row, keeps, completion, mask in zip(
            *(batch[f"{part}_{what}"] for part in ("prompt", "completion") for what in ("ids", "mask")), strict=True
        )
    ]
    prompts = [
        Prompt(prompt_id=i, token_ids=tuple(rows[4 * i][0].tolist()), task="t", representation="r", payload=None)
        for i in range(len(rows) // 4)
    ]
    rollouts = [
        Rollout(prompt_id=i // 4, sample=i % 4, token_ids=ids, sampler_logprob=None, finish="stop", policy_version=0)
        for i, (_, ids) in enumerate(rows)
    ]
    return score(prompts, rollouts, Scores(rewards=tuple(rewards)), o)


@pytest.mark.parametrize(("scale", "name"), [("group", "grpo"), ("none", "dr_grpo")])
def test_advantages_are_those_of_a_step_of_trls_grpo_trainer(tmp_path: Path, scale: str, name: Any) -> None:
    _, batch, rewards = step_of_trl(tmp_path, trl.GRPOTrainer, scale_rewards=scale)
    ours = [a for group in groups_of(batch, rewards, ObjectiveConfig(name=name)) for a in group.advantages]
    assert ours == pytest.approx(batch["advantages"].tolist(), abs=1e-6)
    assert max(ours) > 0.1


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_rloos_advantages_are_those_of_a_step_of_trls_rloo_trainer(tmp_path: Path, beta: float) -> None:
    trainer, batch, rewards = step_of_trl(tmp_path, trl.RLOOTrainer, beta=beta)
    o = ObjectiveConfig(name="rloo", reward_kl_coef=beta)
    groups = groups_of(batch, rewards, o)
    ours = torch.tensor([a for group in groups for a in group.advantages])
    if beta:
        assert (ours - batch["advantages"]).abs().max() > 0.01  # the KL matters
        updates = pack(groups, micro_batch_tok=1000, prompts_per_update=None, objective=o, device=torch.device("cpu"))
        ((packed_batch,), (response_id,)) = updates[0].batches, updates[0].response_ids
        lens = batch["completion_mask"].sum(1).tolist()
        known = []
        for model in (trainer.model, trainer.ref_model):
            with torch.no_grad():
                of_row = stats_of(model, batch, TEMPERATURE)[0].logprob.split(lens)
            known.append([[torch.cat([of_row[i] for i in response_id.tolist()])]])
        ((advantage_N,),) = penalised(updates, *known, o)
        ours = torch.empty(len(lens))
        ours[response_id[packed_batch.seq_id]] = advantage_N
    difference = float((ours - batch["advantages"]).abs().max())
    print(f"\nrloo, beta {beta}: advantages differ by {difference:.1e}")
    assert difference < 1e-5
