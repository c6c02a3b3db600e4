"""Stop strings: finds the token with which the text of a response first contains one of them.

The response ends with that token. What the token holds after the string stays: the ids are those that were drawn, so
that their log-probabilities are exact, and the text that the reward gets is theirs. In rollouts of several turns each
turn is searched by itself.
"""

from collections.abc import Sequence

from isomorph.engine.config import UserError
from isomorph.engine.foreign import foreign
from isomorph.engine.model.text import TextCodec


class StopStrings:
    """Searches responses token by token. Only the end of a response is decoded, and only where a token may end one."""

    def __init__(self, stop: Sequence[str], text: TextCodec) -> None:
        """``stop``: not empty, each of at least one character."""
        self.stop, self.text = tuple(stop), text
        self.longest = max(len(string) for string in stop)
        self._last = {string[-1] for string in stop}
        self._may_end: dict[int, bool] = {}  # by token id

    def first_end(self, token_ids: Sequence[int], start: int = 0) -> int | None:
        """The number of tokens up to the first that completes a stop string, itself included; None if none does.

        ``start``: tokens that were searched before.
        """
        return next((end for end in range(start + 1, len(token_ids) + 1) if self._completes(token_ids, end)), None)

    def completes(self, token_ids: Sequence[int]) -> bool:
        """Whether the last token completes a stop string, if none was complete before."""
        return self._completes(token_ids, len(token_ids))

    def _completes(self, token_ids: Sequence[int], end: int) -> bool:
        if not self._ends_one(token_ids[end - 1]):
            return False
        num_tok = self.longest + 4  # a character may take up to four tokens, special tokens give no text
        while True:
            ending = self.text.decode(token_ids[max(0, end - num_tok) : end])
            if len(ending) > 2 * self.longest or num_tok >= end:
                return any(string in ending for string in self.stop)
            num_tok *= 2

    def _ends_one(self, token_id: int) -> bool:
        """Whether the token's text has the last character of a stop string, or a part of a character."""
        if token_id not in self._may_end:
            piece = self.text.decode([token_id])
            is_spaced = any(last.isspace() for last in self._last)  # tokenizers drop a space at the beginning
            self._may_end[token_id] = is_spaced or "\ufffd" in piece or not self._last.isdisjoint(piece)
        return self._may_end[token_id]


def check_stop_strings(stop: Sequence[str], text: TextCodec) -> None:
    """Raises UserError for a stop string that the text of a response can never contain."""
    for string in stop:
        with foreign(f"the tokenizer fails on {string!r}"):  # after a letter, because some tokenizers drop a space
            ids = [text.tokenizer(before + string, add_special_tokens=False)["input_ids"] for before in ("", "a")]
        if not any(string in text.decode(found) for found in ids):
            raise UserError(
                f"sampling.stop: no text that this tokenizer decodes contains {string!r}: name a special token in "
                "model.stop instead, or write the string as it decodes text"
            )
