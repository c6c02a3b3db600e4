"""TRL's trainers with our kernels: packed groups without padding, each prompt computed once, no [B, L, V] logits.

    trainer = GRPOTrainer(model=..., reward_funcs=..., args=..., train_dataset=...)
    pack_groups(trainer)
    trainer.train()

TRL pads a micro-batch to [B, L], repeating prompts, and calls ``model(ids, mask, labels=..., fused_lm_head=True)`` for
the log-probability and entropy of every label. ``pack_groups`` replaces that call alone: rows with the same prompt
become a packed group, run through ``packed_attention`` and ``linear_logprob``, and the results are returned in TRL's
layout. Sampling, rewards, loss, optimizer, gradient checkpointing, LoRA and checkpoints remain TRL's.

Prompts are shared within a micro-batch only, and TRL shuffles: set ``per_device_train_batch_size`` as large as memory
permits. The only file that imports trl.
"""

import functools
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from isomorph.engine.config import UserError
from isomorph.engine.model.attention import Attend, attend_packed, let_attend
from isomorph.engine.packed_batch import Part, pack_parts
from isomorph.engine.types import PackedBatch, Prompt, Rollout
from isomorph.kernels.linear_logprob import linear_logprob

IGNORED = -100  # label of positions that are not scored
UNSHARDED = ("NO", "MULTI_CPU", "MULTI_GPU")  # accelerate's names for one process and for data parallelism


def pack_groups(trainer: Any) -> None:
    """Makes ``trainer``, a GRPOTrainer or RLOOTrainer of TRL 1.16, compute log-probabilities on packed groups.

    Changes the trainer's model and reference model in place, nothing else. Raises UserError for another trainer, for a
    model of an unsupported family, loaded without attn_implementation="sdpa" or spread over devices, for PEFT's methods
    that learn a prompt, and under FSDP or DeepSpeed, which shard the unembedding.
    """
    import trl  # takes seconds
    from trl.trainer.utils import FusedCausalLMOutput

    if not isinstance(trainer, trl.GRPOTrainer | trl.RLOOTrainer):
        raise UserError(f"pack_groups needs a GRPOTrainer or an RLOOTrainer, got {type(trainer).__name__}")
    if (kind := trainer.accelerator.distributed_type.name) not in UNSHARDED:
        raise UserError(
            f"pack_groups needs the whole model on every device (accelerate: {', '.join(UNSHARDED)}), got {kind}: run "
            "without FSDP and DeepSpeed"
        )
    arguments: Any = trainer.args
    widens_head = isinstance(trainer, trl.GRPOTrainer) and arguments.cast_lm_head_to_fp32  # RLOO has no such option
    models: list[Any] = [model for model in (trainer.model, trainer.ref_model) if model is not None]
    for wrapped in models:
        _refuse_learned_prompts(wrapped)
        model = wrapped.get_base_model() if hasattr(wrapped, "get_base_model") else wrapped  # out of a PeftModel
        _refuse_spread(model)
        let_attend(model)
        answering = _answering(model.forward, FusedCausalLMOutput, trainer.temperature, widens_head)
        functools.update_wrapper(answering, type(model).forward)  # transformers' generate reads its signature
        model.forward = MethodType(answering, model)


def _refuse_learned_prompts(model: Any) -> None:
    for adapter in getattr(model, "peft_config", {}).values():
        if adapter.is_prompt_learning or adapter.is_adaption_prompt:
            raise UserError(
                f"pack_groups needs a model that reads tokens alone, but PEFT's {adapter.peft_type.value} puts a "
                "learned prompt before them: adapt the model with LoRA or train all its weights"
            )


def _refuse_spread(model: Any) -> None:
    devices = sorted({str(parameter.device) for parameter in model.parameters()})
    if len(devices) > 1:
        raise UserError(
            f"pack_groups needs the whole model on one device, got {' and '.join(devices)}: start one process for each "
            "GPU with torchrun, or let the process see one GPU (CUDA_VISIBLE_DEVICES)"
        )


def _answering(
    forward: Callable[..., Any], answer: Callable[..., Any], temperature: float, widens_head: bool
) -> Callable[..., Any]:
    """A ``forward`` that computes log-probabilities itself and passes every other call on to ``forward``."""

    def answering(model: Any, *arguments: Any, fused_lm_head: bool = False, **named: Any) -> Any:
        if not fused_lm_head:
            return forward(*arguments, **named)
        if (named["labels"] == IGNORED).all():  # TRL then returns zeros with a gradient of 0
            return forward(*arguments, fused_lm_head=True, **named)
        given = {name: value for name, value in named.items() if value is not None}  # peft passes None for the rest
        return answer(**_log_probs(model, temperature, widens_head, *arguments, **given))

    return answering


def _log_probs(
    model: Any, temperature: float, widens_head: bool, input_ids: Tensor, attention_mask: Tensor, labels: Tensor
) -> dict[str, Tensor]:
    """``log_probs`` and ``entropy`` in nats, [B, L - 1] each: column j is of the label at j + 1, 0 if it is ignored."""
    batch, row_N, column_N = pack_rows(input_ids, attention_mask, labels)
    hidden_TD = model.model(
        batch.token_ids[None],
        # transformers takes a tensor of four axes for a finished mask
        attention_mask=torch.empty(1, 1, 1, 1, device=input_ids.device),
        position_ids=batch.positions[None],
        use_cache=False,
        attend=_without_autocast(attend_packed(batch.layout)),  # it accumulates in float32 by itself
    ).last_hidden_state[0]
    weight_VD, bias = model.lm_head.weight, model.lm_head.bias
    device = hidden_TD.device.type
    narrows = torch.is_autocast_enabled(device) and not widens_head
    dtype = torch.get_autocast_dtype(device) if narrows else weight_VD.dtype
    with torch.autocast(device, enabled=False):
        stats = linear_logprob(
            hidden_TD.to(dtype),
            weight_VD.to(dtype),
            batch.target_ids,
            row_index_N=batch.row_index,
            bias_V=None if bias is None else bias.to(dtype),
            temperature=temperature,
        )

    def laid_out(stat_N: Tensor) -> Tensor:
        padded_BL = stat_N.new_zeros(len(labels), labels.shape[1] - 1)
        return padded_BL.index_put((row_N, column_N - 1), stat_N)

    return {"log_probs": laid_out(stats.logprob), "entropy": laid_out(stats.entropy)}


def _without_autocast(attend: Attend) -> Attend:
    def attending(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        with torch.autocast(q.device.type, enabled=False):
            # under autocast the rotary embedding returns float32
            return attend(layer, q.to(v.dtype), k.to(v.dtype), v, scale)

    return attending


def pack_rows(token_ids_BL: Tensor, mask_BL: Tensor, labels_BL: Tensor) -> tuple[PackedBatch, Tensor, Tensor]:
    """The packed batch of the rows, and row and column of its N targets, [N] int64 each.

    ``mask_BL`` is 1 at tokens and 0 at padding. The tokens before a row's first label are its prompt. A row without
    labels is left out. Raises ValueError where a label is the first token of a row, because nothing predicts it.
    """
    ids, mask, labels = (x.cpu() for x in (token_ids_BL, mask_BL, labels_BL))
    responses: dict[tuple[int, ...], list[Rollout]] = {}
    columns: list[Tensor] = []  # for each row the columns of its targets
    for row in range(len(ids)):
        is_target = labels[row] != IGNORED
        columns.append(is_target.nonzero()[:, 0])
        if not is_target.any():
            continue
        is_token = mask[row] != 0
        is_token_before = is_token & (torch.arange(len(is_token)) < columns[row][0])
        if not is_token_before.any():
            raise ValueError(f"row {row} begins with a label, but a token must stand before it")
        is_token_after = is_token & ~is_token_before
        # NaN marks a token of the response that is no target
        scored = torch.zeros(is_token.shape).masked_fill(~is_target, torch.nan)[is_token_after]
        responses.setdefault(tuple(ids[row, is_token_before].tolist()), []).append(
            Rollout(
                prompt_id=0,
                sample=row,
                token_ids=ids[row, is_token_after],
                sampler_logprob=scored,
                finish="stop",
                policy_version=0,
            )
        )
    parts = [
        Part(
            Prompt(prompt_id=0, token_ids=prompt, task="", representation="", payload=None),
            tuple(rollouts),
            (0.0,) * len(rollouts),
        )
        for prompt, rollouts in responses.items()
    ]
    batch = pack_parts(parts, token_ids_BL.device)
    rows = [rollout.sample for part in parts for rollout in part.rollouts]
    row_N = torch.tensor(rows, device=batch.seq_id.device)[batch.seq_id]
    return batch, row_N, torch.cat([columns[row] for row in rows]).to(row_N.device)
