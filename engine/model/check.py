"""Checks that a loaded model agrees with its own configuration and can be saved after the last step.

What can be repaired is repaired, and each repair is returned as a sentence; everything else raises UserError.
``engine/model/text.py`` does the same for the tokenizer and the chat template.
"""

import tempfile
from typing import Any

from isomorph.engine.config import UserError
from isomorph.engine.foreign import foreign, one_line
from isomorph.engine.model.families import sliding_window
from isomorph.engine.model.text import TextCodec

# keys of a generation_config.json that transformers refuses to save unless do_sample is true
ONLY_SAMPLED = (
    "temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff",
)  # fmt: skip


def limit_to_window(model: Any) -> list[str]:
    """A note if the sliding window is shorter than the positions, so that it limits ``Policy.max_model_len``."""
    window, positions = sliding_window(model.config), model.config.max_position_embeddings
    if window is None or window >= positions:
        return []
    return [
        f"the model's attention has a sliding window of {window} tokens: prompt and response are limited to {window} "
        f"tokens, not {positions}"
    ]


def end_ids(model: Any) -> list[int]:
    """End-of-sequence token ids of generation_config.json and config.json. Raises UserError if one is no token id."""
    found: list[Any] = []
    for configuration in (model.generation_config, model.config):
        named = getattr(configuration, "eos_token_id", None)
        found += named if isinstance(named, (list, tuple)) else [named]
    ids = [i for i in found if i is not None]
    if bad := [i for i in ids if not isinstance(i, int) or isinstance(i, bool) or i < 0]:
        raise UserError(f"eos_token_id must be token ids, got {bad[0]!r}")
    return ids


def untie(model: Any) -> list[str]:
    """Sets tie_word_embeddings = false if the loaded unembedding is a tensor of its own, and returns a note.

    transformers keeps an unembedding that the file holds beside the embedding. With true in the saved
    config.json it would be dropped when the saved model is loaded.
    """
    if not model.config.tie_word_embeddings or model.lm_head.weight is model.get_input_embeddings().weight:
        return []
    model.config.tie_word_embeddings = False
    return [
        "config.json says that unembedding and embedding are tied, but the weights hold two tensors: both are kept, "
        "and the saved config.json will have tie_word_embeddings = false"
    ]


def repair_generation_config(model: Any, text: TextCodec) -> list[str]:
    """Makes generation_config.json name all stop tokens, and removes what transformers would refuse to save.

    Returns a note for each repair.
    """
    notes = []
    config = model.generation_config
    named = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    if not set(text.stop_ids) <= set(named):
        config.eos_token_id = list(text.stop_ids)
        if config.pad_token_id is None:  # else transformers warns at each call that it pads with eos
            config.pad_token_id = text.tokenizer.pad_token_id
        tokens = ", ".join(map(repr, text.tokenizer.convert_ids_to_tokens(text.stop_ids)))
        notes.append(f"the saved generation_config.json will name all stop tokens: {tokens}")
    if _refusal(config) is None:
        return notes
    if config.do_sample is not True:
        fresh = type(config)()
        idle = {name: getattr(config, name) for name in ONLY_SAMPLED if hasattr(config, name)}
        for name in idle:
            setattr(config, name, getattr(fresh, name))
        if _refusal(config) is None:
            dropped = ", ".join(f"{n} = {v}" for n, v in idle.items() if v != getattr(fresh, n))
            return [*notes, f"generation_config.json has do_sample off and cannot be saved with {dropped}: removed"]
    cause = _refusal(config)
    model.generation_config = type(config)(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    return [*notes, f"generation_config.json cannot be saved, only its token ids are kept: {cause}"]


def _refusal(generation_config: Any) -> str | None:
    """The reason why transformers refuses to save it; None if it does not."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            generation_config.save_pretrained(folder)
    except ValueError as error:
        return one_line(str(error))
    return None


def try_saving(model: Any, tokenizer: Any) -> None:
    """Saves, to a temporary folder, everything that ``Policy.save`` writes but the weights. Raises UserError."""
    with foreign("could not be saved after training"), tempfile.TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
