"""The text of an answer whose tokens come one at a time."""

from typing import Any

_INCOMPLETE = "\ufffd"  # what tokenizers write for bytes that are no character yet


class AnswerText:
    """Decode the tokens of an answer into pieces of text, and find where a stop sequence ends it.

    The pieces together are what decoding all tokens at once gives, without white space around it.

    Args:
        tokenizer: of the model.
        stop: texts that end the answer.

    Attributes:
        stopped: whether one of them was found.
    """

    def __init__(self, tokenizer: Any, stop: tuple[str, ...] = ()) -> None:
        self.tokenizer, self.stop = tokenizer, stop
        self.stopped = False
        # A token's text depends on those before it, so the tokens of two pieces are decoded again with each new one.
        self._tokens: list[int] = []
        self._num_context = 0  # of these tokens, those of the piece before
        self._num_decoded = 0  # characters of all these tokens that are in a piece already
        self._pending = ""  # decoded, and not shown yet
        self._has_begun = False

    def push(self, token: int) -> str:
        """Take the next token, and return the text that can be shown now."""
        self._tokens.append(token)
        self._pending += self._decode_next()
        return self._take(self._num_held())

    def finish(self) -> str:
        """Return the rest of the text, once there are no more tokens."""
        if self.stopped:
            return ""
        self._pending += self._decode_next(is_last=True)
        self._pending = self._pending.rstrip()
        return self._take(0)

    def _decode_next(self, is_last: bool = False) -> str:
        """Return the text that the tokens since the last piece add; none while a character is incomplete."""
        text = self._decode(self._tokens)
        is_complete = is_last or not text.endswith(_INCOMPLETE)
        if not is_complete or len(text) <= self._num_decoded:
            return ""
        piece = text[self._num_decoded :]
        # The tokens of this piece are all that the next one needs.
        del self._tokens[: self._num_context]
        self._num_context = len(self._tokens)
        self._num_decoded = len(self._decode(self._tokens))
        return piece

    def _decode(self, tokens: list[int]) -> str:
        """Decode tokens, without special ones."""
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return text

    def _num_held(self) -> int:
        """Count the characters at the end that may be the beginning of a stop sequence, or white space at the end."""
        text, held = self._pending, 0
        for stop in self.stop:
            for length in range(min(len(stop) - 1, len(text)), held, -1):
                if text.endswith(stop[:length]):
                    held = length
                    break
        # White space before a stop sequence is not shown either.
        return len(text) - len(text[: len(text) - held].rstrip())

    def _take(self, num_held: int) -> str:
        """Return what can be shown, and keep what is held back."""
        if not self._has_begun:
            self._pending = self._pending.lstrip()
            num_held = min(num_held, len(self._pending))
        places = [place for stop in self.stop if (place := self._pending.find(stop)) >= 0]
        if places:
            self.stopped = True
            shown, self._pending = self._pending[: min(places)].rstrip(), ""
        else:
            end = len(self._pending) - num_held
            shown, self._pending = self._pending[:end], self._pending[end:]
        self._has_begun = self._has_begun or bool(shown)
        return shown
