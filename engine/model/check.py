"""Whether a loaded model fits its own configuration, and can be saved after the last step: mended, or refused.

What is mended is returned in sentences. ``engine/model/text.py`` does the same for its tokenizer and chat template.
"""

import tempfile
from typing import Any

from isomorph.engine.config import UserError
from isomorph.engine.foreign import foreign, one_line
from isomorph.engine.model.families import sliding_window
from isomorph.engine.model.text import TextCodec

# keys of a generation_config.json that transformers refuses to save where do_sample is not true
ONLY_SAMPLED = (
    "temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff",
)  # fmt: skip


def limit_to_window(model: Any) -> list[str]:
    """Says where a sliding window is shorter than the positions: ``Policy.max_model_len`` is then the window."""
    window, positions = sliding_window(model.config), model.config.max_position_embeddings
    if window is None or window >= positions:
        return []
    return [
        f"layers look {window} tokens back: a prompt and its response have at most {window} tokens, not {positions}"
    ]


def end_ids(model: Any) -> list[int]:
    """The ends that the model's two configurations name. Raises UserError where one is no token id."""
    found: list[Any] = []
    for configuration in (model.generation_config, model.config):
        named = getattr(configuration, "eos_token_id", None)
        found += named if isinstance(named, (list, tuple)) else [named]
    ids = [i for i in found if i is not None]
    if bad := [i for i in ids if not isinstance(i, int) or isinstance(i, bool) or i < 0]:
        raise UserError(f"eos_token_id must be token ids, got {bad[0]!r}")
    return ids


def untie(model: Any) -> list[str]:
    """transformers keeps a head apart that the file holds beside the embedding; its configuration must say so, or
    whoever loads the saved model drops the head."""
    if not model.config.tie_word_embeddings or model.lm_head.weight is model.get_input_embeddings().weight:
        return []
    model.config.tie_word_embeddings = False
    return ["config.json says that head and embedding are tied, the weights hold two: they stay two, and are saved so"]


def mend_generation_config(model: Any, text: TextCodec) -> list[str]:
    """What transformers would refuse to save after the last step; and the saved model ends where this one does."""
    notes = []
    mended = model.generation_config
    named = mended.eos_token_id if isinstance(mended.eos_token_id, list) else [mended.eos_token_id]
    if not set(text.stop_ids) <= set(named):
        mended.eos_token_id = list(text.stop_ids)
        if mended.pad_token_id is None:  # transformers pads with the end where nothing is named, and says so each time
            mended.pad_token_id = text.tokenizer.pad_token_id
        tokens = ", ".join(map(repr, text.tokenizer.convert_ids_to_tokens(text.stop_ids)))
        notes.append(f"generation_config.json will name all ends of a response: {tokens}")
    if _refusal(mended) is None:
        return notes
    if mended.do_sample is not True:
        fresh = type(mended)()
        idle = {name: getattr(mended, name) for name in ONLY_SAMPLED if hasattr(mended, name)}
        for name in idle:
            setattr(mended, name, getattr(fresh, name))
        if _refusal(mended) is None:
            dropped = ", ".join(f"{n} = {v}" for n, v in idle.items() if v != getattr(fresh, n))
            return [*notes, f"generation_config.json does not sample and could not be saved with {dropped}: left out"]
    cause = _refusal(mended)
    model.generation_config = type(mended)(
        bos_token_id=mended.bos_token_id, eos_token_id=mended.eos_token_id, pad_token_id=mended.pad_token_id
    )
    return [*notes, f"generation_config.json could not be saved, its token ids alone are kept: {cause}"]


def _refusal(generation_config: Any) -> str | None:
    """Why transformers will not save it; None where it will."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            generation_config.save_pretrained(folder)
    except ValueError as error:
        return one_line(str(error))
    return None


def rehearse_saving(model: Any, tokenizer: Any) -> None:
    """All that ``Policy.save`` writes but for the weights: after the last step it must not fail."""
    with foreign("could not be saved after training"), tempfile.TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
