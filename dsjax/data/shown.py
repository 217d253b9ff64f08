# SPDX-License-Identifier: Apache-2.0
"""What of a conversation a chat template shows, and where: found out, not searched for.

In: messages and the text that the template made of them. Out: each piece of the messages (content,
reasoning, names, arguments, tools) with its place in the text, or None where it is not there.
Searching for "a" would find it anywhere. So every piece gets a sentinel of its own in its middle,
and the messages are rendered again: the sentinels show where each piece stands, whole or not, and
without them the text must be the one before, or the template chose by what a piece says (it drops
a text that came before, say); then each piece is tried alone.
Not here: which pieces have to be where (`chat`).
"""

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from dsjax.data.messages import CLOSE, OPEN
from dsjax.data.template import Messages, RenderError, Template, Tools

SENTINEL = re.compile(r"0dsjax\d+x")
TAG = re.compile(r"</?[^<>\s]{1,60}>")


class Piece(NamedTuple):
    """A text of a message, and how the template may write it with its sentinel in it."""

    message: int  # -1 for the tools
    field: str
    text: str
    sentinel: str
    forms: tuple[str, ...]


class Place(NamedTuple):
    """Where a piece stands in a text the last time, from `start` to before `end`."""

    start: int
    end: int


def find_pieces(
    template: Template,
    messages: Messages,
    text: str,
    generate: bool = False,
    thinking: bool = False,
) -> list[tuple[Piece, Place | None]]:
    """Find every piece of a conversation in what the template made of it.

    Args:
      template: of the row, with its tools.
      messages: what was rendered.
      text: what came of it, with the same `generate` and `thinking`.
    """

    def places(marker: _Marker) -> dict[str, Place] | None:
        marked, tools = marker.mark(messages, template.tools)
        try:
            probed = template(marked, generate, thinking, tools)
        except RenderError:
            return None
        if SENTINEL.sub("", probed) != text:
            return None
        return _places(marker.pieces, probed, marker.objects)

    every = _Marker()
    found = places(every)
    if found is None:
        alone = [places(_Marker(number)) for number in range(len(every.pieces))]
        found = {key: place for some in alone for key, place in (some or {}).items()}
    return [(piece, found.get(piece.sentinel)) for piece in every.pieces]


def list_pieces(messages: Messages, tools: Tools) -> list[Piece]:
    """List the pieces of a conversation, as `find_pieces` does."""
    marker = _Marker()
    marker.mark(messages, tools)
    return marker.pieces


class _Marker:
    """Numbers the pieces of a conversation and puts a sentinel into each, or into one of them."""

    def __init__(self, only: int | None = None) -> None:
        self.pieces: list[Piece] = []
        self.objects: list[tuple[str, Any]] = []
        self._only = only

    def mark(self, messages: Messages, tools: Tools) -> tuple[Messages, Tools]:
        """Return a copy of messages and tools that holds sentinels."""
        marked = [self._message(message, index) for index, message in enumerate(messages)]
        return marked, tools and [self._tool(tool, index) for index, tool in enumerate(tools)]

    def _message(self, message: dict[str, Any], index: int) -> dict[str, Any]:
        marked = dict(message)
        if message["content"]:
            marked["content"] = self._content(message["content"], message["role"], index)
        if message["role"] != "tool" and "name" in message:
            marked["name"] = self._text(message["name"], index, "name")
        if "tool_calls" in message:
            calls = enumerate(message["tool_calls"])
            marked["tool_calls"] = [
                self._call(call, index, f"tool_calls[{at}].function") for at, call in calls
            ]
        return marked

    def _content(self, content: str, role: str, index: int) -> str:
        """Mark reasoning and answer each: templates show the answer without the reasoning."""
        if role != "assistant" or CLOSE not in content:
            return self._text(content, index, "content")
        reasoning, close, answer = content.rpartition(CLOSE)
        opening, opens, thought = reasoning.rpartition(OPEN)
        marked = opening + opens + self._text(thought, index, "reasoning")
        return marked + close + self._text(answer, index, "content")

    def _call(self, call: dict[str, Any], index: int, field: str) -> dict[str, Any]:
        function = call["function"]
        name = self._text(function["name"], index, f"{field}.name")
        where = f"{field}.arguments"
        if isinstance(function["arguments"], str):
            # JSON within JSON is another text than the one in the row.
            arguments = self._text(function["arguments"], index, where, escaped=False)
        else:
            first = len(self.pieces)
            arguments = self._object(function["arguments"], index, where)
            self.objects += [(piece.sentinel, arguments) for piece in self.pieces[first:]]
        return {**call, "function": {**function, "name": name, "arguments": arguments}}

    def _object(self, value: Any, index: int, field: str) -> Any:
        if isinstance(value, dict):
            return {
                self._text(str(key), index, f"{field}.{key}", at_end=True): self._object(
                    inner, index, f"{field}.{key}"
                )
                for key, inner in value.items()
            }
        if isinstance(value, list):
            return [self._object(v, index, f"{field}[{at}]") for at, v in enumerate(value)]
        return self._text(value, index, field) if isinstance(value, str) else value

    def _tool(self, tool: dict[str, Any], at: int) -> dict[str, Any]:
        """Mark a tool's name and description; templates may rewrite the schema of its arguments."""
        if isinstance(tool.get("function"), dict):
            return {**tool, "function": self._tool_texts(tool["function"], f"[{at}].function")}
        return self._tool_texts(tool, f"[{at}]")

    def _tool_texts(self, tool: dict[str, Any], field: str) -> dict[str, Any]:
        texts = {
            key: self._text(tool[key], -1, f"{field}.{key}")
            for key in ("name", "description")
            if isinstance(tool.get(key), str)
        }
        return {**tool, **texts}

    def _text(
        self, text: str, message: int, field: str, escaped: bool = True, at_end: bool = False
    ) -> str:
        core = text.strip()
        if not core:
            return text
        number = len(self.pieces)
        sentinel = f"0dsjax{number}x"
        spot = len(core) if at_end else _spot(core)
        marked = core[:spot] + sentinel + core[spot:]
        forms = dict.fromkeys((marked, _json(marked)[1:-1], json.dumps(marked)[1:-1]))
        self.pieces.append(
            Piece(message, field, core, sentinel, tuple(forms) if escaped else (marked,))
        )
        if self._only not in (None, number):
            return text
        start = text.index(core)
        return text[:start] + marked + text[start + len(core) :]


def _spot(core: str) -> int:
    """Choose where a sentinel goes: templates look at the ends of a text, and for tags in it."""
    middle = (len(core) + 1) // 2
    tags = TAG.finditer(core) if "<" in core else ()
    tag = next((tag for tag in tags if tag.start() < middle < tag.end()), None)
    if tag is None or tag.span() == (0, len(core)):
        return middle
    return tag.end() if tag.end() < len(core) else tag.start()


def _places(
    pieces: Sequence[Piece], probed: str, objects: Sequence[tuple[str, Any]]
) -> dict[str, Place]:
    """Find the last place of each piece, counted without the sentinels."""
    by_sentinel = {piece.sentinel: piece for piece in pieces}
    places, removed = {}, 0
    for found in SENTINEL.finditer(probed):
        piece = by_sentinel.get(found.group())
        whole = piece and next(_wholes(piece, probed, found.start()), None)
        if piece and whole:
            start, form = whole[0] - removed, whole[1]
            places[piece.sentinel] = Place(start, start + len(form) - len(piece.sentinel))
        removed += len(found.group())
    for sentinel, value in objects:
        # A template that wants text prints an object as Python does, which is not JSON.
        if str(value) in probed and str(value) != _json(value):
            places.pop(sentinel, None)
    return places


def _wholes(piece: Piece, probed: str, at: int) -> Iterator[tuple[int, str]]:
    """Yield where a piece whose sentinel stands at `at` begins, if it is whole, and its form."""
    for form in piece.forms:
        start = at - form.index(piece.sentinel)
        if start >= 0 and probed.startswith(form, start):
            yield start, form


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
