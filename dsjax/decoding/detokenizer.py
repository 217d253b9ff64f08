# SPDX-License-Identifier: Apache-2.0
"""Tokens to text, piece by piece as they come.

In: one token after the other. Out: the text that is certain by now: half a character, and what may
turn out to be the beginning of a stop text, are held back. All pieces together are the text of all
tokens at once. Not done here: printing.
"""

from collections.abc import Collection, Sequence

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


class TextBatch:
    """The texts of a batch of rows, from the tokens that `decode.generate` tells.

    Attributes:
        texts: of each row, what is certain by now.
        ended: the rows that are complete.
    """

    def __init__(self, streams: Sequence[TextStream], stop_ids: Collection[int]) -> None:
        self.texts = [""] * len(streams)
        self.ended: set[int] = set()
        self._streams, self._stop_ids = streams, stop_ids

    def take(self, row: int, token: int) -> bool:
        """Take a row's next token; returns whether a stop text ends the row."""
        stream = self._streams[row]
        if token in self._stop_ids:
            self._end(row)
            return False
        self.texts[row] += stream.push(token)
        if stream.stopped:
            self._end(row)
        return stream.stopped

    def close(self) -> list[int]:
        """End the rows that are left; returns them: the limit cut them."""
        cut = [row for row in range(len(self.texts)) if row not in self.ended]
        for row in cut:
            self._end(row)
        return cut

    def _end(self, row: int) -> None:
        self.texts[row] += self._streams[row].finish()
        self.ended.add(row)
