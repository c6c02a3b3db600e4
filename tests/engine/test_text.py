"""The word tokenizer, chat templates and stop tokens."""

from pathlib import Path

import pytest
from small_policy import CPU, VOCABULARY, tiny_policy
from small_world import one_thread  # noqa: F401

from isomorph.engine.config import ModelConfig
from isomorph.engine.model.load import load_policy
from isomorph.engine.model.text import TextCodec, word_tokenizer


def test_a_word_a_number_a_tag_and_a_sign_are_one_token_each() -> None:
    tokenizer = word_tokenizer(VOCABULARY)
    ids = tokenizer("stir:30minutes,<answer>12</answer>.")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == [
        "[BOS]", "stir", ":", "30", "minutes", ",", "<answer>", "12", "</answer>", ".",
    ]  # fmt: skip
    assert tokenizer.decode(ids, skip_special_tokens=True) == "stir : 30 minutes , <answer> 12 </answer> ."


def test_what_is_not_in_the_vocabulary_is_unknown() -> None:
    tokenizer = word_tokenizer(VOCABULARY)
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("boil 31 Stir ✓ </stir>")["input_ids"])
    assert tokens == ["[BOS]", "[UNK]", "[UNK]", "[UNK]", "[UNK]", "[UNK]"]


def test_a_vocabulary_with_a_word_twice_or_a_special_token_is_refused() -> None:
    for words in (["a", "a"], ["[PAD]"], ["[EOS]", "b"]):
        with pytest.raises(ValueError, match="each word once"):
            word_tokenizer(words)


def test_a_response_ends_in_the_stop_token_and_its_text_does_not_show_it() -> None:
    text = tiny_policy().text
    ids = text.encode_response("take 5")
    assert ids[-1] == text.stop_ids[0] and len(ids) == 3
    assert text.decode(ids) == "take 5"
    assert text.encode_response("") == (text.stop_ids[0],)


def test_the_chat_template_is_used_where_there_is_one_and_it_is_wanted() -> None:
    tokenizer = word_tokenizer(VOCABULARY)
    tokenizer.chat_template = (
        "{% for m in messages %}take {{ m['content'] }} .{% endfor %}{% if add_generation_prompt %} total :{% endif %}"
    )
    wanted, unwanted = (TextCodec(tokenizer, chat_template=flag, stop_ids=[1]) for flag in (True, False))
    assert tokenizer.convert_ids_to_tokens(wanted.encode_prompt("stir 5"))[-6:] == [
        "take",
        "stir",
        "5",
        ".",
        "total",
        ":",
    ]
    assert tokenizer.convert_ids_to_tokens(unwanted.encode_prompt("stir 5"))[-2:] == ["stir", "5"]


@pytest.mark.model
@pytest.mark.slow
def test_the_real_135m_models_chat_template_is_used(smollm2_folder: Path) -> None:
    policy = load_policy(ModelConfig(path=str(smollm2_folder)), vocabulary=[], seed=0, device=CPU)
    ids = policy.text.encode_prompt("Say hello.")
    assert policy.text.uses_chat_template
    assert policy.text.tokenizer.decode(ids).endswith("<|im_start|>assistant\n")
    assert policy.text.decode(policy.text.encode_response("Hello!")) == "Hello!"
