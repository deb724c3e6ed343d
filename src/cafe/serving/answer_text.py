"""The text of an answer whose tokens come one at a time."""

from typing import Any

_INCOMPLETE = "�"  # what tokenizers write for bytes that are no character yet
MAX_INCOMPLETE = 64  # tokens that are waited for; a character has four bytes, so these are none


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
        self._tokens: list[int] = []
        # A token's text depends on those before it: the tokens between these two are decoded again with each new one.
        self._context, self._decoded = 0, 0
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
        self._pending += self._decode_next(final=True)
        self._pending = self._pending.rstrip()
        return self._take(0)

    def _decode_next(self, final: bool = False) -> str:
        """Return the text of the tokens that were not decoded yet; none while a character is incomplete."""
        context = self._decode(self._tokens[self._context : self._decoded])
        text = self._decode(self._tokens[self._context :])
        waits = text.endswith(_INCOMPLETE) and len(self._tokens) - self._decoded < MAX_INCOMPLETE
        if not final and (waits or len(text) <= len(context)):
            return ""
        self._context, self._decoded = self._decoded, len(self._tokens)
        return text[len(context) :]

    def _decode(self, tokens: list[int]) -> str:
        """Decode tokens, without special ones."""
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return text

    def _num_held(self) -> int:
        """Count the characters at the end that may be the beginning of a stop sequence, or white space at the end."""
        text = self._pending
        held = len(text) - len(text.rstrip())
        for stop in self.stop:
            for length in range(min(len(stop) - 1, len(text)), held, -1):
                if text.endswith(stop[:length]):
                    held = length
                    break
        return held

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
