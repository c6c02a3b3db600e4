"""TRL's trainers on our kernels: a prompt goes through the model once for its group, padding never, no logits are kept.

    trainer = GRPOTrainer(model=..., reward_funcs=..., args=..., train_dataset=...)
    pack_groups(trainer)
    trainer.train()

TRL pads a micro-batch to [B, L], its prompts repeated, and asks ``model(ids, mask, labels=..., fused_lm_head=True)``
for the log-probability and entropy of every label. That call, and no other, is answered here: rows with one prompt
become a packed group, attended by ``packed_attention`` and scored by ``linear_logprob``, and the answer is laid out as
TRL expects it. Sampling, rewards, loss, optimizer, recomputation, LoRA and checkpoints stay TRL's.

Prompts are shared within a micro-batch, and TRL shuffles: let ``per_device_train_batch_size`` be as large as memory
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

IGNORED = -100  # the label of what is not scored
WHOLE = ("NO", "MULTI_CPU", "MULTI_GPU")  # what accelerate calls one process, and data parallel


def pack_groups(trainer: Any) -> None:
    """From now on ``trainer``, a GRPOTrainer or RLOOTrainer of TRL 1.16, computes log-probabilities packed.

    Raises UserError for another trainer, for a model that is not a decoder of the Llama family with
    attn_implementation="sdpa", and under FSDP or DeepSpeed, which cut the unembedding up.
    """
    import trl  # takes seconds
    from trl.trainer.utils import FusedCausalLMOutput

    if not isinstance(trainer, trl.GRPOTrainer | trl.RLOOTrainer):
        raise UserError(f"pack_groups needs a GRPOTrainer or an RLOOTrainer, got {type(trainer).__name__}")
    if (kind := trainer.accelerator.distributed_type.name) not in WHOLE:
        raise UserError(
            f"pack_groups needs the whole model on every device (accelerate: {', '.join(WHOLE)}), got {kind}"
        )
    arguments: Any = trainer.args
    widens_head = isinstance(trainer, trl.GRPOTrainer) and arguments.cast_lm_head_to_fp32  # RLOO cannot
    models: list[Any] = [model for model in (trainer.model, trainer.ref_model) if model is not None]
    for wrapped in models:
        model = wrapped.get_base_model() if hasattr(wrapped, "get_base_model") else wrapped  # inside of a PeftModel
        let_attend(model)
        answering = _answering(model.forward, FusedCausalLMOutput, trainer.temperature, widens_head)
        functools.update_wrapper(answering, type(model).forward)  # generate reads its signature
        model.forward = MethodType(answering, model)


def _answering(
    forward: Callable[..., Any], answer: Callable[..., Any], temperature: float, widens_head: bool
) -> Callable[..., Any]:
    """``forward`` of a model, but where log-probabilities are asked for."""

    def answering(model: Any, *arguments: Any, fused_lm_head: bool = False, **named: Any) -> Any:
        if not fused_lm_head:
            return forward(*arguments, **named)
        if (named["labels"] == IGNORED).all():  # TRL's own zeros, with gradients of 0
            return forward(*arguments, fused_lm_head=True, **named)
        given = {name: value for name, value in named.items() if value is not None}  # peft fills in the rest
        return answer(**_log_probs(model, temperature, widens_head, *arguments, **given))

    return answering


def _log_probs(
    model: Any, temperature: float, widens_head: bool, input_ids: Tensor, attention_mask: Tensor, labels: Tensor
) -> dict[str, Tensor]:
    """``log_probs`` and ``entropy``, [B, L - 1] each: column j speaks of the label at j + 1; 0 where it is ignored."""
    batch, row_N, column_N = pack_rows(input_ids, attention_mask, labels)
    hidden_TD = model.model(
        batch.token_ids[None],
        attention_mask=torch.empty(1, 1, 1, 1, device=input_ids.device),  # four axes: taken for a finished mask
        position_ids=batch.positions[None],
        use_cache=False,
        attend=_without_autocast(attend_packed(batch.layout)),  # it sums in float32 where that matters
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
            return attend(layer, q.to(v.dtype), k.to(v.dtype), v, scale)  # under autocast rotation widens q and k

    return attending


def pack_rows(token_ids_BL: Tensor, mask_BL: Tensor, labels_BL: Tensor) -> tuple[PackedBatch, Tensor, Tensor]:
    """The rows packed, and [N] int64 each, row and column of every target. ``mask`` is 1 where a token is.

    What stands before a row's first label is its prompt. A row without labels is left out.
    Raises ValueError where a row begins with a label, for nothing predicts it.
    """
    ids, mask, labels = (x.cpu() for x in (token_ids_BL, mask_BL, labels_BL))
    responses: dict[tuple[int, ...], list[Rollout]] = {}
    columns: list[Tensor] = []  # of its targets, a row
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
        # not finite: in the response, but no target
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
