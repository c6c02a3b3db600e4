"""What a chat template writes after an assistant's turn: the tokens with which a conversation goes on.

The sequence goes on from the tokens that were drawn. So only the new messages are rendered, after a chat of one known
answer: what the template writes behind that answer, up to where the next answer begins, follows the drawn stop token.

    drawn        ... 4 2 <|im_end|>
    rendered     <|im_start|>user PROBE <|im_end|> <|im_start|>assistant ANSWER <|im_end|> \n <|im_start|>user ...
    what is added                                                                           ------------------------

A turn that a stop string ended has no stop token: what the template writes before the next message is added whole.

Without a chat template the messages are plain text, a line each; what a tool returned stands in <result> tags.
"""

import threading
from collections.abc import Mapping, Sequence
from typing import Any

from isomorph.engine.config import UserError
from isomorph.engine.foreign import foreign, shortened
from isomorph.engine.model.text import ANSWER, PROBE, TextCodec

HEARD = "There are 17 apples."  # a message that the template must keep


class ReplyFormat:
    """Encodes an environment's messages as what follows the model's turn."""

    def __init__(
        self, text: TextCodec, *, template: str | None = None, arguments: Mapping[str, Any] | None = None
    ) -> None:
        """``template``: Jinja, None: the tokenizer's own. ``arguments``: what it is rendered with."""
        self.text, self.template, self.arguments = text, template, dict(arguments or {})
        self.is_chat = text.uses_chat_template or template is not None
        self._lock = threading.Lock()  # a tokenizer's settings are changed by each call

    def check(self, roles: Sequence[str]) -> None:
        """Raises UserError where the template allows no message of one of ``roles`` after an assistant's turn."""
        for role in roles if self.is_chat else ():
            said = self.text.decode(self.encode([message(role, HEARD)]))
            if "17" not in said:
                raise UserError(
                    f"the chat template drops a message of role {role!r} that follows an assistant's turn: it writes "
                    f"'{shortened(said)}'; use another model.chat_template, or an environment without this role"
                )

    def encode(self, messages: Sequence[Mapping[str, Any]], *, is_stopped: bool = True) -> tuple[int, ...]:
        """Token ids of ``messages``, each with ``role`` and ``content``, from behind the stop token of the model's turn
        up to where its next turn begins.

        ``is_stopped``: False where the turn has no stop token, but ends with a stop string: the ids begin with what the
        template writes up to its stop token, and that token.

        Raises UserError where the template fails on them, or writes no stop token behind an assistant's turn.
        """
        with self._lock:
            ids = self._after_answer(messages, is_stopped) if self.is_chat else self._tokens(f"\n{_plain(messages)}\n")
        return self.text.known_ids(ids, str([m.get("content") for m in messages]))

    def _after_answer(self, messages: Sequence[Mapping[str, Any]], is_stopped: bool) -> list[int]:
        turns = [message("user", PROBE), message("assistant", ANSWER), *map(dict, messages)]
        roles = ", ".join(repr(m["role"]) for m in messages)
        with foreign(f"the chat template does not allow a message of role {roles} after an assistant's turn"):
            rendered = self.text.tokenizer.apply_chat_template(
                turns, chat_template=self.template, add_generation_prompt=True, tokenize=False, **self.arguments
            )
        _, found, after = rendered.partition(ANSWER)
        ids = self._tokens(after) if found else []
        end = next((i for i, token in enumerate(ids) if token in self.text.stop_ids), None)
        if end is None or self.text.tokenizer.decode(ids[:end]).strip():
            raise UserError(
                "the chat template writes no stop token behind an assistant's turn, so a conversation cannot go on "
                f"from the model's own tokens: after the answer it writes '{shortened(after)}'; name its end of turn "
                "in [model] stop, or use a chat template that has one"
            )
        return ids[end + 1 :] if is_stopped else ids

    def _tokens(self, text: str) -> list[int]:
        return list(self.text.tokenizer(text, add_special_tokens=False)["input_ids"])


def message(role: str, content: str) -> dict[str, Any]:
    """A chat message."""
    return {"role": role, "content": content}


def _plain(messages: Sequence[Mapping[str, Any]]) -> str:
    return "\n".join(
        f"<result> {m['content']} </result>" if m["role"] == "tool" else str(m["content"]) for m in messages
    )
