"""What is checked once at load: model, tokenizer, chat template, stop tokens, answer tags, and what saving needs."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from isomorph.engine.config import ModelConfig, UserError
from isomorph.engine.model.attention import let_attend
from isomorph.engine.model.load import load_policy, read_shape
from isomorph.engine.model.policy import Policy

CPU = torch.device("cpu")
TAGS = ("<answer>", "</answer>")
END = "<|end|>"  # of every tokenizer below, id 256 where it has no begin token
USER = "{{ '<|user|>' + messages[0].content + '<|assistant|>' }}"
TURNS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make(folder: Path, *, template: Any = None, special: tuple[str, ...] = (), rows: int = 0, **changes: Any) -> Path:
    """A decoder with random weights and a tokenizer of bytes, as ``save_pretrained`` leaves them.

    ``changes``: ``bos`` and ``pad`` of the tokenizer, ``append`` (what it puts after a text), keys of config.json.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    bos, pad, append = (changes.pop(name, None) for name in ("bos", "pad", "append"))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token=END, pad_token=pad or END, **({"bos_token": bos} if bos else {})
    )
    tokenizer.add_tokens([AddedToken(token, special=True) for token in special], special_tokens=True)
    if bos or append:
        around = [(token, tokenizer.convert_tokens_to_ids(token)) for token in (bos, append) if token]
        single = f"{bos or ''} $A {append or ''}".strip()
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=around)
    tokenizer.chat_template = template
    config = transformers.AutoConfig.for_model(
        changes.pop("type", "llama"),
        **{
            "vocab_size": rows or len(tokenizer),
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "tie_word_embeddings": True,
            "eos_token_id": tokenizer.eos_token_id,
            "bos_token_id": None,
            "pad_token_id": None,
            **changes,
        },
    )
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def load(folder: Path, **choices: Any) -> Policy:
    return load_policy(ModelConfig(path=str(folder), **choices), vocabulary=[], seed=0, device=CPU, tags=TAGS)


def refusal(folder: Path, **choices: Any) -> str:
    with pytest.raises(UserError) as caught:
        load(folder, **choices)
    message = str(caught.value)
    assert "\n" not in message and str(folder) in message
    return message


def token_id(policy: Policy, token: str) -> int:
    found = policy.text.tokenizer.get_vocab()[token]
    assert isinstance(found, int)
    return found


# -- ids and rows
def test_tokens_beyond_the_embedding_are_refused_by_name_before_weights_are_trained(tmp_path: Path) -> None:
    folder = make(tmp_path, template=USER, special=("<|user|>", "<|assistant|>"), rows=257)
    message = refusal(folder)
    assert "2 tokens beyond" in message and "'<|user|>'" in message and "257 rows" in message
    with pytest.raises(UserError, match="beyond the embedding"):
        read_shape(ModelConfig(path=str(folder)), [])


def test_a_pad_beyond_the_embedding_is_refused_only_where_a_text_holds_it(tmp_path: Path) -> None:
    policy = load(make(tmp_path, pad="[PAD]", rows=257))
    assert max(policy.text.encode_prompt("pad it")) < 257
    for encode in (policy.text.encode_prompt, policy.text.encode_response):
        with pytest.raises(UserError, match=r"'\[PAD\]' has the id 257.*rows for 0 to 256.*say \[PAD\] twice"):
            encode("say [PAD] twice")


# -- chat template
@pytest.mark.parametrize(
    ("template", "named"),
    [
        ("{{ raise_exception('a system turn\nmust come first') }}", "TemplateError: a system turn must come first"),
        ("{{ messages[1].content }}", "UndefinedError"),
        ("{% if %}", "TemplateSyntaxError"),
        ("{{ 1 + messages[0].content }}", "TypeError"),
        ({"rag": "{{ messages[0].content }}"}, "no default"),
        ("{{ messages[1:] }}", "drops or changes the user's turn"),
        ("{{ messages[0].content[:20] }}", "drops or changes the user's turn"),
        ("{% for part in messages[0].content %}{{ part }} {% endfor %}", "drops or changes the user's turn"),
    ],
)
def test_a_template_that_cannot_carry_a_question_is_refused_with_the_whole_cause(
    tmp_path: Path, template: Any, named: str
) -> None:
    folder = make(tmp_path, template=template)
    message = refusal(folder)
    assert named in message and "model.chat_template = false" in message
    plain = load(folder, chat_template=False).text
    assert plain.decode(plain.encode_prompt("stir 5")) == "stir 5"


def test_a_question_that_the_template_refuses_is_named(tmp_path: Path) -> None:
    template = "{% if 'lions' in messages[0].content %}{{ raise_exception('no') }}{% endif %}{{ messages[0].content }}"
    text = load(make(tmp_path, template=template)).text
    assert text.encode_prompt("sheep")
    with pytest.raises(UserError, match="chat template fails on 'Two lions': TemplateError: no"):
        text.encode_prompt("Two lions")


# -- stop tokens
def test_the_end_of_a_turn_is_a_stop_token_and_the_saved_model_ends_there_too(tmp_path: Path) -> None:
    folder = make(tmp_path / "model", template=TURNS, special=("<|im_start|>", "<|im_end|>"))
    policy = load(folder)
    turn_end = token_id(policy, "<|im_end|>")
    assert policy.text.stop_ids == (turn_end, 256)
    assert policy.text.encode_response("5")[-1] == turn_end  # what a chat model ends a turn with
    assert any("'<|im_end|>'" in note and "stop token" in note for note in policy.notes)
    policy.save(tmp_path / "saved")
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert set(saved.generation_config.eos_token_id) == {turn_end, 256}
    assert load(tmp_path / "saved").text.stop_ids == policy.text.stop_ids
    assert load(folder, chat_template=False).text.stop_ids == (256,)


def test_ends_of_tokenizer_config_and_generation_config_are_united(tmp_path: Path) -> None:
    folder = make(tmp_path, eos_token_id=[7, 256])
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 4000]}))
    policy = load(folder)
    assert policy.text.stop_ids == (256, 9, 7)  # 4000 cannot be drawn: there are 257 rows
    assert any("4000" in note for note in policy.notes)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": "<|end|>"}))
    assert "token ids, got '<|end|>'" in refusal(folder)


def test_further_stop_tokens_are_single_tokens_by_their_text(tmp_path: Path) -> None:
    folder = make(tmp_path, special=("<|stop|>",))
    policy = load(folder, stop=("<|stop|>", "\n"))
    newline = policy.text.tokenizer("\n")["input_ids"]
    assert policy.text.stop_ids == (256, token_id(policy, "<|stop|>"), *newline)
    assert policy.text.decode([*policy.text.tokenizer("5")["input_ids"], *newline]) == "5"  # without what ended it
    assert "model.stop: 'the end' must be one token" in refusal(folder, stop=("the end",))
    assert "model.stop: '' must be one token" in refusal(folder, stop=("",))


def test_a_pad_that_is_the_end_leaves_the_end_in_the_response(tmp_path: Path) -> None:
    policy = load(make(tmp_path))
    assert policy.text.tokenizer.pad_token_id == policy.text.stop_ids[0] == policy.text.encode_response("5")[-1]
    assert policy.notes == ()


# -- answer tags, begin and end
@pytest.mark.parametrize("stop", [(), ("</answer>",)])
def test_answer_tags_that_are_special_tokens_survive_decoding(tmp_path: Path, stop: tuple[str, ...]) -> None:
    policy = load(make(tmp_path, special=TAGS, bos="<s>"), stop=stop)
    ids = policy.text.encode_response("So <answer>7 min</answer>")
    assert policy.text.decode([token_id(policy, "<s>"), *ids]) == "So <answer>7 min</answer>"
    assert policy.text.decode(ids[:-1]) == "So <answer>7 min</answer>"  # also where the tag itself is the end
    assert any("special tokens" in note for note in policy.notes)


def test_a_tokenizer_that_cannot_write_the_tags_is_refused(tmp_path: Path) -> None:
    folder = make(tmp_path)
    described = json.loads((folder / "tokenizer.json").read_text())
    described["normalizer"] = {"type": "Replace", "pattern": {"String": "<"}, "content": "("}
    (folder / "tokenizer.json").write_text(json.dumps(described))
    assert "no answer could be found" in refusal(folder)


def test_a_begin_that_template_and_tokenizer_write_stands_once(tmp_path: Path) -> None:
    twice = load(make(tmp_path / "a", bos="<s>", template="{{ bos_token + bos_token + messages[0].content }}"))
    begin = token_id(twice, "<s>")
    assert twice.text.encode_prompt("ab").count(begin) == 1
    assert any("twice" in note for note in twice.notes)
    plain = load(make(tmp_path / "b", bos="<s>"))
    assert plain.text.encode_prompt("<s>ab") == plain.text.encode_prompt("ab")  # a question with its template applied
    assert plain.notes == ()


def test_an_end_that_the_tokenizer_appends_to_a_prompt_is_taken_away(tmp_path: Path) -> None:
    policy = load(make(tmp_path, bos="<s>", append=END))
    end = token_id(policy, END)
    assert policy.text.tokenizer("ab")["input_ids"][-1] == end
    assert end not in policy.text.encode_prompt("ab")
    assert any("ends a prompt" in note for note in policy.notes)


# -- what saving needs
@pytest.mark.parametrize(
    ("generation", "named"),
    [
        ({"do_sample": False, "temperature": 0.9, "top_p": 0.6, "top_k": 3, "min_p": 0.1}, "temperature = 0.9"),
        ({"temperature": 0.6}, "temperature = 0.6"),
        ({"early_stopping": True, "num_beams": 1, "length_penalty": 2.0}, "length_penalty"),
    ],
)
def test_a_generation_config_that_transformers_refuses_to_save_is_mended_at_load(
    tmp_path: Path, generation: dict[str, Any], named: str
) -> None:
    folder = make(tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps({**generation, "eos_token_id": 256}))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(ValueError):
        theirs.save_pretrained(tmp_path / "theirs")
    policy = load(folder)
    (note,) = policy.notes
    assert "generation_config.json" in note and named in note
    policy.save(tmp_path / "saved")
    assert (tmp_path / "saved" / "model.safetensors").is_file()
    assert load(tmp_path / "saved").notes == ()


def test_a_generation_config_that_samples_stays_as_it_is(tmp_path: Path) -> None:
    folder = make(tmp_path / "model")
    kept = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": 256}
    (folder / "generation_config.json").write_text(json.dumps(kept))
    policy = load(folder)
    policy.save(tmp_path / "saved")
    assert kept.items() <= json.loads((tmp_path / "saved" / "generation_config.json").read_text()).items()
    assert policy.notes == ()


@pytest.mark.parametrize("content", ["{", "[]", "\0"])
def test_a_broken_generation_config_is_not_passed_over(tmp_path: Path, content: str) -> None:
    folder = make(tmp_path)
    (folder / "generation_config.json").write_text(content)
    assert "generation_config.json must hold a JSON object" in refusal(folder)


def test_a_tokenizer_that_cannot_be_saved_is_refused_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("a vocabulary without a file")

    folder = make(tmp_path)
    monkeypatch.setattr(transformers.PreTrainedTokenizerFast, "save_pretrained", fail)
    assert "could not be saved after training: OSError: a vocabulary without a file" in refusal(folder)


def test_a_head_that_is_only_said_to_be_tied_is_kept_and_saved(tmp_path: Path) -> None:
    folder = make(tmp_path / "model", tie_word_embeddings=False)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    policy = load(folder)
    head = policy.unembedding.detach()
    assert not torch.equal(head, policy.model.model.embed_tokens.weight)
    assert any("tied" in note for note in policy.notes)
    policy.save(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["tie_word_embeddings"] is False
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(again.lm_head.weight, head)


# -- what is missing
def test_a_folder_without_a_tokenizer_says_what_is_missing(tmp_path: Path) -> None:
    folder = make(tmp_path)
    for file in folder.glob("*token*"):
        file.unlink()
    message = refusal(folder)
    assert "holds no tokenizer" in message and "tokenizer.json" in message and not message.endswith(":")


# -- sliding windows
WINDOWED: dict[str, Any] = {
    "mistral": {},
    "qwen2": dict(use_sliding_window=True, max_window_layers=1),
    "qwen3": dict(use_sliding_window=True, max_window_layers=0),
}


def windowed(folder: Path, window: int, family: str = "mistral") -> Path:
    return make(folder, type=family, sliding_window=window, rows=300, **WINDOWED[family])


@pytest.mark.parametrize("family", WINDOWED)
@torch.no_grad()
def test_a_window_bounds_the_sequences_and_within_it_logits_are_transformers_own(tmp_path: Path, family: str) -> None:
    folder = windowed(tmp_path, 16, family)
    policy = load(folder)
    assert policy.max_model_len == 16
    assert any("sliding window of 16 tokens" in note for note in policy.notes)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    ids = torch.randint(0, 256, (1, 20), generator=torch.Generator().manual_seed(0))

    def ours(length: int) -> torch.Tensor:
        from isomorph.engine.model.attention import attend_packed
        from isomorph.kernels.packed_layout import PackedLayout

        layout = PackedLayout.from_groups([length], [[0]])
        return (
            policy.backbone(ids[:, :length], torch.arange(length)[None], attend_packed(layout)) @ policy.unembedding.T
        )

    torch.testing.assert_close(ours(16), theirs(input_ids=ids[:, :16]).logits, rtol=0, atol=1e-5)
    assert (ours(20) - theirs(input_ids=ids).logits).abs().max() > 1e-3  # beyond it they differ: hence the bound


def test_a_window_longer_than_every_sequence_changes_nothing(tmp_path: Path) -> None:
    policy = load(windowed(tmp_path, 4096))
    assert policy.max_model_len == 64 and policy.notes == ()
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa")
    let_attend(model)
    model.config._attn_implementation, model.config.sliding_window = "sdpa", 8
    with pytest.raises(UserError, match="over 8 tokens"):
        let_attend(model)
