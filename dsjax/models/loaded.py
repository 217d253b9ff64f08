# SPDX-License-Identifier: Apache-2.0
"""What a model of `load_pretrained` does besides computing logits: generate, and be saved.

In: what the user gives. Out: what `Origin` makes of it, which `load_pretrained` sets. Not done
here: any of it, since it needs the rooms above (`decoding`, `export`).
"""

import os
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from flax import nnx


@runtime_checkable
class Origin(Protocol):
    """What a model was loaded from: a checkpoint, with its tokenizer."""

    def read_tokenizer(self) -> Any:
        """Return the checkpoint's tokenizer."""

    def generate(
        self, model: Any, prompts: Any, *, max_new_tokens: int, stop: Sequence[str], **sampling: Any
    ) -> Any:
        """Continue prompts with the values that the model has now."""

    def save_pretrained(self, model: Any, directory: str | os.PathLike[str], format: str) -> None:
        """Save the values that the model has now."""


class Loaded(nnx.Module):
    """The methods of a model that has an origin.

    Attributes:
        origin: what it was loaded from; None for one that was built only.
    """

    origin: Origin | None = None

    @property
    def tokenizer(self) -> Any:
        """The checkpoint's tokenizer, one of transformers' fast ones."""
        return self._loaded().read_tokenizer()

    def generate(
        self,
        prompts: Any,
        *,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        stop: Sequence[str] = (),
    ) -> Any:
        """Continue prompts until the model ends, or the limit, which stderr then tells.

        Args:
            prompts: a text to go on with; a conversation to answer, as a list of messages with
                `role` and `content`; token ids, as a list or an array; or a list of several.
            max_new_tokens: limit for each.
            temperature: 0 takes the likeliest token each time.
            top_k: draw from the k likeliest tokens.
            top_p: draw from the likeliest tokens that hold this probability.
            seed: of the draws; what follows a prompt does not depend on the prompts beside it.
            stop: texts that end an answer, and are left out of it.

        Returns:
            What follows, without the prompt: text for texts and conversations, ids for ids; a list
            for a list of prompts.

        Raises:
            ConfigError: a prompt or a number is wrong.
        """
        sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
        return self._loaded().generate(
            self, prompts, max_new_tokens=max_new_tokens, stop=stop, **sampling
        )

    def save_pretrained(self, directory: str | os.PathLike[str], format: str = "merged") -> None:
        """Save the model with the values that it has now: `dsjax.save_pretrained`."""
        self._loaded().save_pretrained(self, directory, format)

    def _loaded(self) -> Origin:
        assert self.origin is not None, "not a model of load_pretrained"
        return self.origin
