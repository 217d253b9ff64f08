# SPDX-License-Identifier: Apache-2.0
"""The forms in which a chat template may want what a row says; none of them says anything else.

In: a conversation. Out: the same with null or empty content beside calls, arguments as objects or
as JSON text, tools in OpenAI's wrapping or without; and without the end that a row writes itself.
Not here: which of the forms a template shows (`chat`).
"""

import itertools
import json
from collections.abc import Callable, Iterator
from typing import Any

from dsjax.config.json_file import parse
from dsjax.data.formats import Chat
from dsjax.data.shown import list_pieces
from dsjax.data.template import RenderError, Template, without_end
from dsjax.errors import ConfigError, raise_all


def readings(chat: Chat) -> Iterator[Chat]:
    """Yield a conversation as it is given, then in the other forms that templates ask for.

    Nothing that is said changes: null or "" beside calls, arguments as an object or as JSON text,
    a tool alone or as `{"type": "function", "function": tool}`.
    """
    seen: list[Chat] = []
    empties: tuple[Callable[[Any], Any], ...] = (_same, lambda _: None, lambda _: "")
    forms = (_same, _as_text, _as_object)
    for wrapped, empty, form in itertools.product((_same, _wrapped), empties, forms):
        messages = [_reread(message, empty, form) for message in chat.messages]
        tools = chat.tools and [wrapped(tool) for tool in chat.tools]
        reading = chat._replace(messages=messages, tools=tools)
        if reading not in seen:
            seen.append(reading)
            yield reading


def _reread(
    message: dict[str, Any], empty: Callable[[Any], Any], form: Callable[[Any], Any]
) -> dict[str, Any]:
    if "tool_calls" not in message:
        return message
    calls = [
        {
            **call,
            "function": {**call["function"], "arguments": form(call["function"]["arguments"])},
        }
        for call in message["tool_calls"]
    ]
    content = message["content"]
    return {**message, "content": content or empty(content), "tool_calls": calls}


def _same(value: Any) -> Any:
    return value


def _as_text(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _as_object(arguments: Any) -> Any:
    """Return arguments as an object; as they are, where the text is not one in JSON."""
    if not isinstance(arguments, str):
        return arguments
    try:
        value = parse(arguments.encode("utf-8"))
    except ValueError:
        return arguments
    return value if isinstance(value, dict) else arguments


def _wrapped(tool: dict[str, Any]) -> dict[str, Any]:
    return tool if "function" in tool else {"type": "function", "function": tool}


def without_ends(chat: Chat, stops: list[str], origin: str) -> Chat:
    """Take off what ends an assistant's turn, for the template writes it; refuse it elsewhere.

    Raises:
      ConfigError: a text holds what ends a turn; names its place.
    """
    messages = [
        {**message, "content": without_end(message["content"], stops)}
        if message["role"] == "assistant" and message["content"]
        else message
        for message in chat.messages
    ]
    raise_all(
        f"{origin} {chat.field(piece.message, piece.field)}: got text with {stop} in it, expected "
        "that at most at the end of an assistant's text, for generation ends there; take it out"
        for piece in list_pieces(messages, chat.tools)
        for stop in stops
        if stop in piece.text
    )
    return chat._replace(messages=messages)


def check_tool_results(template: Template, chat: Chat) -> None:
    """Refuse a row whose tool results the template writes as if the assistant had said them."""
    results = [index for index, message in enumerate(chat.messages) if message["role"] == "tool"]
    if not results:
        return
    spoken = [{**m, "role": "assistant"} if m["role"] == "tool" else m for m in chat.messages]
    try:
        same = template(spoken) == template(chat.messages)
    except RenderError:
        return
    if same:
        raise ConfigError(
            f"{template.origin} {chat.name(results[0])}: got a tool message, which the chat "
            "template writes as the assistant's, expected one that has a branch for the role tool; "
            "use a template that does, or put the result into a user message"
        )


def check_null(template: Template, chat: Chat) -> None:
    """Refuse a reading with nulls where the template writes them as text."""
    last = max((index + 1 for index, weight in enumerate(chat.weights) if weight), default=None)
    messages = chat.messages[:last]
    nulls = [index for index, message in enumerate(messages) if message["content"] is None]
    if not nulls:
        return
    text = template(messages)
    try:
        other = template([{**m, "content": m["content"] or ""} for m in messages])
    except RenderError:
        return
    if text.count(str(None)) > other.count(str(None)):
        raise RenderError(
            f"{template.origin} {chat.name(nulls[0])}.content: got null, which the chat template "
            "writes as None, expected text; write some"
        )
