# SPDX-License-Identifier: Apache-2.0
"""Tokens to text, piece by piece as they come.

In: one token after the other. Out: the text that is certain by now: half a character, and what may
turn out to be the beginning of a stop text, are held back. All pieces together are the text of all
tokens at once. Not done here: printing.
"""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerFast

UNFINISHED = "\ufffd"
"""What decoders put where bytes are no whole character."""

CONTEXT = 8
"""Tokens of the prompt that are decoded with the first new ones: some decoders drop a leading
space, and would drop it of a continuation too."""


class TextStream:
    """The text that follows a prompt; `stopped` once a stop text has come, which is left out."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, prompt: Sequence[int], stops: Sequence[str] = ()
    ) -> None:
        self._tokenizer, self._stops = tokenizer, [stop for stop in stops if stop]
        self._shown = list(prompt[-CONTEXT:])
        self._pending: list[int] = []
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Take a token; returns the text that it makes certain, perhaps none."""
        self._pending.append(token)
        text = self._pending_text()
        return "" if not text or text.endswith(UNFINISHED) else self._advance(text)

    def finish(self) -> str:
        """Return what was held back, at the end of the tokens."""
        rest = "" if self.stopped else self._advance(self._pending_text()) + self._held
        self._held = ""
        return rest

    def _pending_text(self) -> str:
        before = self._decode(self._shown)
        return self._decode(self._shown + self._pending)[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def _advance(self, text: str) -> str:
        """Let decoded text out as far as no stop text can begin in it."""
        self._shown, self._pending = self._pending[-CONTEXT:] or self._shown, []
        self._held += text
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            ready, self._held = self._held[: min(found)], ""
            return ready
        cut = len(self._held) - max((self._overlap(stop) for stop in self._stops), default=0)
        ready, self._held = self._held[:cut], self._held[cut:]
        return ready

    def _overlap(self, stop: str) -> int:
        """Length of the longest end of the held text that a stop text begins with."""
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(stop[:n])), 0)
