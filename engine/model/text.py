"""Converts between text and token ids, and checks tokenizer and chat template when the model is loaded.

``open_text`` repairs what it can and puts a sentence for each repair into ``TextCodec.notes``; everything else raises
UserError before the first step. ``word_tokenizer`` and ``byte_tokenizer`` are the tokenizers of tiny models.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from isomorph.engine.config import UserError
from isomorph.engine.foreign import cause_of, foreign, shortened

# The question that ``open_text`` sends through the chat template: the rendered prompt must contain it unchanged.
PROBE = "Please add 17 and 25, then say what the sum is."
ANSWER = "The sum is 42."
NAMED = 3  # a message lists so many tokens at most
WORD = r"</?[a-z]+>|[A-Za-z]+|\d+|[^\sA-Za-z\d]"  # a tag, a word, a number or a sign: one token each
SPECIAL = PAD, EOS, BOS, UNK = "[PAD]", "[EOS]", "[BOS]", "[UNK]"


@dataclass(frozen=True, slots=True)
class ChatFormat:
    """How the chats of one source of prompts are written: its chat template and the values it is rendered with."""

    template: str | None = None  # Jinja; None: the tokenizer's own
    arguments: Mapping[str, Any] = field(default_factory=dict)  # such as enable_thinking


class TextCodec:
    """Encodes prompts (through the chat template) and responses, and decodes without special tokens.

    ``formats`` holds the ``ChatFormat`` of prompts that do not use the tokenizer's chat template as it is, by the name
    of their source; ``add_format`` checks and adds one.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        chat_template: bool,
        stop_ids: Sequence[int],
        tag_ids: Iterable[int] = (),
        num_rows: int | None = None,
    ) -> None:
        """``stop_ids``: tokens that end a response; demonstrations end with the first.

        ``tag_ids``: tokens that are decoded even if they are special or stop tokens. ``num_rows``: rows of the
        embedding, None if unknown.
        """
        self.tokenizer = tokenizer
        self.uses_chat_template = chat_template and tokenizer.chat_template is not None
        self.stop_ids = tuple(stop_ids)
        self.notes: tuple[str, ...] = ()  # what ``open_text`` repaired, one sentence each
        self.formats: dict[str, ChatFormat] = {}
        # JSON schemas of the tools that a source's chats tell the model of, by the name of the source
        self.tools: dict[str, list[dict[str, Any]]] = {}
        self._tag_ids = frozenset(tag_ids)
        special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        special.update(tokenizer.all_special_ids)
        # None unless a tag is special: then decode drops nothing by itself, and these ids are removed before
        self._dropped_ids = special - self._tag_ids if special & self._tag_ids else None
        self._num_rows = num_rows

    def encode_prompt(self, question: str, format: str = "") -> tuple[int, ...]:
        """Token ids of a prompt whose only turn is ``question``, up to where the response begins.

        ``format``: a name in ``formats``; others mean the tokenizer's chat template. Raises UserError if tokenizer or
        template fails on it, or if a token has no row in the embedding.
        """
        return self.encode_messages(_user(question), format)

    def encode_messages(self, messages: Sequence[Mapping[str, Any]], format: str = "") -> tuple[int, ...]:
        """Token ids of a chat, up to where the response begins; messages have a ``role`` and a ``content``.

        Without a chat template the contents are joined by blank lines. Otherwise as ``encode_prompt``.
        """
        known = self.formats.get(format, ChatFormat())
        is_chat = self.uses_chat_template or known.template is not None
        said = "\n\n".join(content_text(message["content"]) for message in messages)
        with foreign(f"{'the chat template' if is_chat else 'the tokenizer'} fails on '{shortened(said)}'"):
            if is_chat:
                ids = self.tokenizer.apply_chat_template(
                    list(messages),
                    chat_template=known.template,
                    add_generation_prompt=True,
                    return_dict=False,
                    **self.chat_arguments(format),
                )
            else:
                ids = self.tokenizer(said)["input_ids"]
        return self._known(_without_extra_ends(ids, self.tokenizer, is_chat), said)

    def chat_arguments(self, name: str) -> dict[str, Any]:
        """What the chats of the source ``name`` are rendered with, its tools included."""
        tools = {"tools": self.tools[name]} if self.tools.get(name) else {}
        return {**self.formats.get(name, ChatFormat()).arguments, **tools}

    def known_ids(self, ids: Sequence[int], text: str) -> tuple[int, ...]:
        """``ids``, which are those of ``text``. Raises UserError if a token has no row in the embedding."""
        return self._known(ids, text)

    def add_format(self, name: str, format: ChatFormat) -> None:
        """Makes ``format`` known as ``name``, after a chat was rendered with it.

        Raises UserError where the template fails, drops the user's turn, or ends a turn with a token that would not
        end a response; and where there are arguments and no template.
        """
        template = format.template or (self.tokenizer.chat_template if self.uses_chat_template else None)
        if template is None:
            if format.arguments:
                raise UserError("chat_arguments are for a chat template, and the model's tokenizer has none in use")
            return

        def rendered(turns: list[dict[str, str]], ends_open: bool) -> str:
            return self.tokenizer.apply_chat_template(
                turns,
                chat_template=format.template,
                add_generation_prompt=ends_open,
                tokenize=False,
                **format.arguments,
            )

        with foreign("the chat template refuses a single turn of a user"):
            prompt = rendered(_user(PROBE), True)
        if PROBE not in prompt:
            raise UserError(f"the chat template drops or changes the user's turn: it renders '{shortened(prompt)}'")
        with foreign("the chat template refuses an assistant's turn"):
            whole = rendered([*_user(PROBE), {"role": "assistant", "content": ANSWER}], False)
        end = _end_after_answer(self.tokenizer, whole)
        if end is not None and end not in self.stop_ids:
            token = self.tokenizer.convert_ids_to_tokens(end)
            raise UserError(
                f"the chat template ends a turn with {token!r}, which does not end a response of this model: add it to "
                f'the recipe: [model] stop = ["{token}"]'
            )
        self.formats[name] = format

    def encode_response(self, text: str) -> tuple[int, ...]:
        """Token ids of a demonstration, with the first stop token at the end, which is trained as well."""
        with foreign(f"the tokenizer fails on '{shortened(text)}'"):
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return (*self._known(ids, text), self.stop_ids[0])

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of a response, without special tokens and the stop token at the end; answer tags are kept."""
        if len(token_ids) and token_ids[-1] in self.stop_ids and token_ids[-1] not in self._tag_ids:
            token_ids = token_ids[:-1]
        if self._dropped_ids is None:
            return self.tokenizer.decode(token_ids, skip_special_tokens=True)
        return self.tokenizer.decode([i for i in token_ids if i not in self._dropped_ids], skip_special_tokens=False)

    def _known(self, ids: Sequence[int], text: str) -> tuple[int, ...]:
        if self._num_rows is not None and max(ids, default=0) >= self._num_rows:
            token = self.tokenizer.convert_ids_to_tokens(max(ids))
            raise UserError(
                f"the token {token!r} has the id {max(ids)}, the embedding has rows for 0 to {self._num_rows - 1}: "
                f"take it out of the text '{shortened(text)}'"
            )
        return tuple(ids)


def open_text(
    tokenizer: Any,
    *,
    chat_template: bool,
    stop: Sequence[str],
    end_ids: Sequence[int],
    tags: Sequence[str],
    num_rows: int,
) -> TextCodec:
    """The codec of a loaded tokenizer, after checking tokenizer, chat template, stop tokens and answer tags.

    ``stop``: further stop tokens, as text. ``end_ids``: end-of-sequence ids of the model's configuration. ``tags``:
    strings that must survive encoding and decoding. ``num_rows``: rows of the embedding. Raises UserError.

    Turns the tokenizer's threads off for this process, unless TOKENIZERS_PARALLELISM is set.
    """
    # reward workers are forked from this process, and the tokenizer's thread pool does not survive a fork
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    refuse_ids_beyond(tokenizer, num_rows)
    notes: list[str] = []
    turn_end = None
    if chat_template and tokenizer.chat_template is not None:
        _refuse_unfit_template(tokenizer)
        turn_end = _end_of_turn(tokenizer, notes)
    stop_ids = _stop_ids(tokenizer, turn_end, end_ids, stop, num_rows, notes)
    tag_ids = _tag_ids(tokenizer, tags, notes)
    text = TextCodec(tokenizer, chat_template=chat_template, stop_ids=stop_ids, tag_ids=tag_ids, num_rows=num_rows)
    _note_prompt(text, notes)
    text.notes = tuple(notes)
    return text


def refuse_ids_beyond(tokenizer: Any, num_rows: int) -> None:
    """Raises UserError if the vocabulary has a token without a row in the embedding; padding alone may have none."""
    with foreign("the tokenizer does not give its vocabulary"):
        found = {i: token for token, i in tokenizer.get_vocab().items() if i >= num_rows}
    beyond = [repr(found[i]) for i in sorted(found) if i != tokenizer.pad_token_id or i == tokenizer.eos_token_id]
    if beyond:
        raise UserError(
            f"the tokenizer has {len(beyond)} tokens beyond the embedding, whose {num_rows} rows are ids 0 to "
            f"{num_rows - 1}: {_listed(beyond)} (largest id {max(found)}); use the tokenizer that belongs to these "
            "weights, or enlarge the embedding and save the model: model.resize_token_embeddings(len(tokenizer))"
        )


def _refuse_unfit_template(tokenizer: Any) -> None:
    cure = "correct chat_template in the model's folder, or set model.chat_template = false"
    with foreign(f"the tokenizer's chat template refuses a single turn of a user ({cure})"):
        rendered = tokenizer.apply_chat_template(_user(PROBE), add_generation_prompt=True, tokenize=False)
    if PROBE not in rendered:
        raise UserError(
            f"the tokenizer's chat template drops or changes the user's turn: it renders {PROBE!r} as "
            f"'{shortened(rendered)}'; {cure}"
        )


def _end_of_turn(tokenizer: Any, notes: list[str]) -> int | None:
    """Id of the added token that the template writes after an assistant's answer; None if there is none."""
    turns = [*_user(PROBE), {"role": "assistant", "content": ANSWER}]
    try:
        rendered = tokenizer.apply_chat_template(turns, tokenize=False)
    except Exception as error:  # no harm: only user turns go through the template later
        notes.append(
            f"the chat template fails on an assistant's turn, so its end of turn is unknown: {cause_of(error)}"
        )
        return None
    return _end_after_answer(tokenizer, rendered)


def _end_after_answer(tokenizer: Any, rendered: str) -> int | None:
    _, found, after = rendered.rpartition(ANSWER)
    ids = tokenizer(after.strip(), add_special_tokens=False)["input_ids"] if found else []
    return ids[0] if ids and ids[0] in tokenizer.added_tokens_decoder else None


def _stop_ids(
    tokenizer: Any,
    turn_end: int | None,
    end_ids: Sequence[int],
    stop: Sequence[str],
    num_rows: int,
    notes: list[str],
) -> list[int]:
    """All stop tokens; first the one that demonstrations end with."""
    known = [i for i in (tokenizer.eos_token_id, *end_ids) if i is not None]
    if turn_end is not None and turn_end not in known:
        notes.append(
            f"the chat template ends a turn with {tokenizer.convert_ids_to_tokens(turn_end)!r}, which is no "
            "end-of-sequence token of tokenizer or model: it is used as a stop token"
        )
    drawn = [i for i in known if i < num_rows]
    if len(drawn) < len(known):
        beyond = sorted({i for i in known if i >= num_rows})
        notes.append(f"end-of-sequence ids {beyond} have no row among the model's {num_rows} and are ignored")
    asked = [_stop_id(tokenizer, text) for text in stop]
    ids = list(dict.fromkeys([*([] if turn_end is None else [turn_end]), *drawn, *asked]))
    if not ids:
        raise UserError(
            "the model names no end-of-sequence token: set eos_token_id in its generation_config.json, or name a token "
            'of its tokenizer in the recipe: [model] stop = ["..."]'
        )
    return ids


def _stop_id(tokenizer: Any, text: str) -> int:
    found = tokenizer.get_vocab().get(text)
    ids = [found] if found is not None else tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) != 1 or (ids[0] == tokenizer.unk_token_id and text != tokenizer.unk_token):
        pieces = tokenizer.convert_ids_to_tokens(ids)
        raise UserError(f"model.stop: {text!r} must be one token of the model's tokenizer, got {len(ids)}: {pieces}")
    return ids[0]


def _tag_ids(tokenizer: Any, tags: Sequence[str], notes: list[str]) -> set[int]:
    """Ids of the tokens of the answer tags. Raises UserError if an answer between them does not survive decoding."""
    if not tags:
        return set()
    stated = f"{tags[0]}7{tags[-1]}"
    with foreign(f"the tokenizer fails on {stated!r}"):
        ids = tokenizer(stated, add_special_tokens=False)["input_ids"]
        bare, whole = (tokenizer.decode(ids, skip_special_tokens=flag) for flag in (True, False))
    if not all(tag in whole for tag in tags):
        raise UserError(
            f"the tokenizer turns {stated!r} into '{shortened(whole)}', so that no answer could be found between "
            f"{' and '.join(tags)}: use a tokenizer that can encode them"
        )
    if not all(tag in bare for tag in tags):
        lost = [tag for tag in tags if tag not in bare]
        notes.append(f"{' and '.join(lost)} are special tokens of this tokenizer: they are kept in decoded text")
    return {i for tag in tags for i in tokenizer(tag, add_special_tokens=False)["input_ids"]}


def _note_prompt(text: TextCodec, notes: list[str]) -> None:
    """Notes what ``encode_prompt`` will remove from every prompt, and a prompt that ends with a stop token."""
    tokenizer = text.tokenizer
    if text.uses_chat_template:
        with foreign("the tokenizer fails on its own chat template"):
            ids = tokenizer.apply_chat_template(_user(PROBE), add_generation_prompt=True, return_dict=False)
    else:
        with foreign(f"the tokenizer fails on {PROBE!r}"):
            ids = tokenizer(PROBE)["input_ids"]
    cleaned = _without_extra_ends(ids, tokenizer, text.uses_chat_template)
    if cleaned[:2] != ids[:2]:
        notes.append(f"a prompt begins with {tokenizer.bos_token!r} twice: one is removed")
    if cleaned[-1:] != ids[-1:]:
        notes.append(f"the tokenizer ends a prompt with {tokenizer.eos_token!r}: it is removed")
    rest = [i for i in cleaned if tokenizer.decode([i]).strip()]
    if rest and rest[-1] in text.stop_ids:
        last = tokenizer.convert_ids_to_tokens(rest[-1])
        notes.append(f"the chat template ends a prompt with the stop token {last!r} and opens no assistant's turn")


def _without_extra_ends(ids: Sequence[int], tokenizer: Any, uses_chat_template: bool) -> list[int]:
    """``ids`` with one bos where tokenizer and template wrote one each, and without an eos that a tokenizer appends."""
    ids, bos, eos = list(ids), tokenizer.bos_token_id, tokenizer.eos_token_id
    while bos is not None and ids[:2] == [bos, bos]:
        del ids[0]
    while not uses_chat_template and eos is not None and eos != bos and len(ids) > 1 and ids[-1] == eos:
        del ids[-1]
    return ids


def content_text(content: Any) -> str:
    """The text of a message's content: a string, or a list of parts of which each has a ``text``."""
    return content if isinstance(content, str) else "".join(part.get("text") or "" for part in content or ())


def _user(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


def _listed(items: Sequence[str]) -> str:
    return ", ".join(items[:NAMED]) + (", ..." if len(items) > NAMED else "")


def word_tokenizer(vocabulary: Sequence[str]) -> PreTrainedTokenizerFast:
    """A tokenizer with one token for each word, number, tag or punctuation mark; unknown ones become [UNK].

    Ids 0 to 3 are [PAD] [EOS] [BOS] [UNK], then ``vocabulary`` in its order. Prompts begin with [BOS]. Raises
    ValueError for a repeated word.
    """
    words = [*SPECIAL, *vocabulary]
    if len(set(words)) != len(words):
        raise ValueError("vocabulary must hold each word once, and none of [PAD] [EOS] [BOS] [UNK]")
    table = {word: index for index, word in enumerate(words)}
    inner = Tokenizer(models.WordLevel(table, unk_token=UNK))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(WORD), behavior="removed", invert=True)
    inner.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, table[BOS])])
    # no decoder: tokens are then joined with spaces
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token=PAD, eos_token=EOS, bos_token=BOS, unk_token=UNK)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token for each byte of UTF-8 text, which reads and writes any text.

    Ids 0 to 3 are [PAD] [EOS] [BOS] [UNK], then the 256 bytes. Prompts begin with [BOS].
    """
    table = {token: index for index, token in enumerate([*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    inner = Tokenizer(models.BPE(vocab=table, merges=[], unk_token=UNK))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, table[BOS])])
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token=PAD, eos_token=EOS, bos_token=BOS, unk_token=UNK)
