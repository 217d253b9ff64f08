# SPDX-License-Identifier: Apache-2.0
"""The checkpoint's chat template at work: messages -> text, and what ends a turn in it.

In: a tokenizer with a chat template, messages, tools. Out: text, or a `ConfigError` that says where
the messages stand, whatever the template throws. Nulls reach the template as they are, for some
have a branch for `content is none`. Not here: what of the messages the text shows (`shown`), what
is trained (`chat`).
"""

import re
from functools import lru_cache
from typing import Any, NamedTuple

import jinja2
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from dsjax.data.limits import LimitError, limited
from dsjax.data.messages import OPEN
from dsjax.data.tokenizer import backend
from dsjax.errors import ConfigError

PROBE = "dsjax-probe-of-the-template"
MOST_CHARACTERS = 10_000_000
"""Of a rendered conversation: far more than any model reads, and tokenised in seconds."""

ORDER = re.compile(r"alternat|\border\b")

Messages = list[dict[str, Any]]
Tools = list[dict[str, Any]] | None


class RenderError(ConfigError):
    """The template did not come to an end with these messages."""


class EndlessError(ConfigError):
    """The template had to be ended: other conversations would fare no better."""


class Template:
    """A chat template, bound to the tools of one row and to where its messages stand."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, origin: str, tools: Tools = None
    ) -> None:
        if not tokenizer.chat_template:
            raise ConfigError(
                f"{origin}: got a conversation and a tokenizer without chat template, expected "
                "`chat_template` in tokenizer_config.json or a chat_template.jinja beside it; use "
                "the instruct model's, or rows of the format prompt_completion or text"
            )
        self.tokenizer, self.origin, self.tools = tokenizer, origin, tools
        self.source = str(tokenizer.chat_template)

    def __call__(
        self,
        messages: Messages,
        generate: bool = False,
        thinking: bool = False,
        tools: Tools = None,
    ) -> str:
        """Render messages as text.

        Args:
          messages: with `role` and `content` each; none at all is allowed.
          generate: whether the assistant is to speak next.
          thinking: read by V3.1's template alone.
          tools: in the place of the row's own.

        Raises:
          RenderError: the template raises anything.
          EndlessError: it takes too long, or too much memory, or its text has no end.
        """
        tools = tools or self.tools
        try:
            settings: dict[str, Any] = {
                **self.tokenizer.special_tokens_map,
                "chat_template": self.tokenizer.get_chat_template(None, tools),
                "tools": tools,
                "add_generation_prompt": generate,
                "thinking": thinking,
            }
            # Not `apply_chat_template`, which drops nulls and refuses a conversation of no message.
            with limited():
                texts, _ = render_jinja_template([messages], **settings)
        except LimitError as error:
            raise EndlessError(self._excess(str(error))) from None
        except Exception as error:  # templates are programs: RecursionError, MemoryError, ...
            raise RenderError(self._refusal(error)) from error
        if len(texts[0]) > MOST_CHARACTERS:
            raise EndlessError(self._excess(f"it makes {len(texts[0]):,} characters of it"))
        return texts[0]

    def _excess(self, taken: str) -> str:
        return (
            f"{self.origin}: got a conversation that the chat template refuses ({taken}), expected "
            f"one that it renders; correct the template in {self.tokenizer.name_or_path}"
        )

    def _refusal(self, error: Exception) -> str:
        if isinstance(error, jinja2.TemplateSyntaxError):
            return (
                f"{self.origin}: got a chat template that is not Jinja (line {error.lineno}: "
                f"{error}), expected one that is; correct it beside the model's tokenizer"
            )
        kind = type(error)
        said = str(error) if kind is jinja2.TemplateError else f"{kind.__name__}: {error}"
        fix = "; check the order of the roles" if ORDER.search(said.lower()) else ""
        return (
            f"{self.origin}: got a conversation that the chat template refuses ({said[:300]}), "
            f"expected one that it renders{fix}"
        )


class Ending(NamedTuple):
    """How a template ends the assistant's turn: its text, and the token in it where that is one."""

    text: str
    token: int | None


def turn_ending(tokenizer: PreTrainedTokenizerFast) -> Ending | None:
    """Find what a chat template writes after an assistant's text.

    Returns:
      The text from the answer on, and the EOS or the first added token in it; None where there is
      no template, or one that does not render a question and an answer.
    """
    return _turn_ending(tokenizer, str(tokenizer.chat_template))


@lru_cache(maxsize=8)
def _turn_ending(tokenizer: PreTrainedTokenizerFast, template: str) -> Ending | None:
    """Find it once; `template` is what the answer depends on."""
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": PROBE}]
    try:
        _, found, text = Template(tokenizer, "messages")(messages).rpartition(PROBE)
    except ConfigError:
        return None
    if not found:
        return None
    ids = backend(tokenizer).encode(text, add_special_tokens=False).ids
    added = [token for token in ids if token in tokenizer.added_tokens_decoder]
    eos = tokenizer.eos_token_id
    return Ending(text, eos if eos in added else next(iter(added), None))


def opens_reasoning(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether a chat template opens reasoning before an answer, at least where it is asked to."""
    return _opens_reasoning(tokenizer, str(tokenizer.chat_template))


@lru_cache(maxsize=8)
def _opens_reasoning(tokenizer: PreTrainedTokenizerFast, template: str) -> bool:
    """Find it once; `template` is what the answer depends on."""
    messages = [{"role": "user", "content": "?"}]
    try:
        prompt = Template(tokenizer, "messages")(messages, generate=True, thinking=True)
    except ConfigError:
        return False
    return prompt.rstrip().endswith(OPEN)


def stop_texts(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """List the texts of the tokens that end a turn: EOS, and the template's if it is another."""
    ending = turn_ending(tokenizer)
    texts = [str(tokenizer.eos_token)] if tokenizer.eos_token else []
    if ending is not None and ending.token not in (None, tokenizer.eos_token_id):
        texts.append(str(tokenizer.added_tokens_decoder[ending.token].content))
    return texts


def without_end(text: str, stops: list[str]) -> str:
    """Return text without the stop texts at its end, and without what follows them."""
    while True:
        rest = text.rstrip()
        stop = next((stop for stop in stops if rest.endswith(stop)), None)
        if stop is None:
            return text
        text = rest.removesuffix(stop)
