# SPDX-License-Identifier: Apache-2.0
"""Generate: text from a model, with or without an adapter.

    python -m dsjax.generate --model DIR [--adapter DIR] --prompt TEXT [--prompt TEXT ...]
    python -m dsjax.generate --model DIR [--adapter DIR] --chat [--prompt TEXT ...]

`--prompt` is text to go on with; with `--chat` it is what a user says, put through the checkpoint's
chat template, and `--chat` alone is a conversation, line by line from stdin. stdout has the
answers and nothing else. Not done here: the loop over tokens (`decoding`).
"""

import argparse
import os
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast

from dsjax.config import MeshSection
from dsjax.config.inputs import may_download
from dsjax.data import encode_chat, encode_text, load_tokenizer
from dsjax.decoding.decode import (
    generate,
    length_warnings,
    prompt_problems,
    request_problems,
)
from dsjax.decoding.detokenizer import TextBatch, TextStream
from dsjax.decoding.sampling import Sampling
from dsjax.distributed.bootstrap import refuse_several
from dsjax.distributed.compilation_cache import keep_compiled
from dsjax.distributed.mesh import make_mesh
from dsjax.errors import raise_all, renamed
from dsjax.generate.options import make_parser
from dsjax.models import Model
from dsjax.models.config_checks import count_problems
from dsjax.pretrained import load_pretrained
from dsjax.training.console import working
from dsjax.weights.generation_config import stop_tokens
from dsjax.weights.load import open_checkpoint

OPTIONS = {
    "model.path": "--model",
    "adapter.path": "--adapter",
    "max_new_tokens": "--max-new-tokens",
    "temperature": "--temperature",
    "top_k": "--top-k",
    "top_p": "--top-p",
    "seed": "--seed",
}
"""What messages call a setting -> what it is called here."""

INTERRUPTED = 130


def main(argv: Sequence[str]) -> int:
    """Generate what the command line asks for."""
    words = make_parser().parse_args(argv)
    refuse_several("dsjax.generate", os.environ)
    keep_compiled(os.environ)
    try:
        with renamed(OPTIONS):
            return run(words)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return INTERRUPTED


def run(words: argparse.Namespace) -> int:
    """Check everything that is cheap to check, load the model, then answer."""
    sampling = Sampling(words.temperature, words.top_k, words.top_p)
    numbers = request_problems(words.max_new_tokens, sampling, words.seed)
    raise_all(_text_problems(words) + numbers)
    source = open_checkpoint(words.model, weights=False, adapter=words.adapter)
    tokenizer = load_tokenizer(source.directory)
    if words.chat:
        prompts = [encode_chat(tokenizer, [_message("user", text)]) for text in words.prompt]
        encode_chat(tokenizer, [_message("user", "Hello")])  # is there a template?
    else:
        prompts = [encode_text(tokenizer, text) for text in words.prompt]
    stop_ids = stop_tokens(source, tokenizer)
    raise_all(count_problems(source.config, ["vocab_size"], []))
    raise_all(prompt_problems(prompts, source.config["vocab_size"]))
    print(f"loading {words.model}", file=sys.stderr)
    # Every matrix product is shared by all devices: rows are few, weights are many.
    mesh = make_mesh(MeshSection(fsdp=1, tensor=-1))
    with working("loading", not may_download(words.model), at_once=False):
        model = load_pretrained(words.model, words.adapter, words.dtype, mesh)
    speaker = ChatSession(model, tokenizer, stop_ids, words.stop, words.max_new_tokens, sampling)
    if prompts:
        speaker.say(prompts, words.seed, titles=words.prompt if len(prompts) > 1 else ())
    else:
        _converse(speaker, words.seed)
    return 0


@dataclass(frozen=True)
class ChatSession:
    """A model that answers on stdout."""

    model: Model
    tokenizer: PreTrainedTokenizerFast
    stop_ids: Collection[int]
    stops: Sequence[str]
    max_new_tokens: int
    sampling: Sampling

    def say(self, prompts: Sequence[list[int]], seed: int, titles: Sequence[str] = ()) -> list[str]:
        """Continue the prompts, print what comes, return it."""
        limit = self.model.config.max_position_embeddings
        for line in length_warnings(prompts, self.max_new_tokens, limit):
            print(line, file=sys.stderr)
        streams = [TextStream(self.tokenizer, prompt, self.stops) for prompt in prompts]
        batch = TextBatch(streams, self.stop_ids)
        printer = StreamPrinter(batch, titles)
        waiting = ExitStack()

        def take(row: int, token: int) -> bool:
            waiting.close()  # the screen is the answer's from here on
            return printer.take(row, token)

        with waiting:
            waiting.enter_context(working("compiling, and reading the prompt", at_once=False))
            generate(
                self.model,
                prompts,
                max_new_tokens=self.max_new_tokens,
                stop_ids=self.stop_ids,
                **self.sampling._asdict(),
                seed=seed,
                on_token=take,
            )
        for row in printer.close():
            print(f"prompt {row + 1}: cut at {self.max_new_tokens} new tokens", file=sys.stderr)
        return batch.texts


class StreamPrinter:
    """Prints the rows of a batch one after another, the first unfinished one as it comes."""

    def __init__(self, batch: TextBatch, titles: Sequence[str] = ()) -> None:
        self._batch, self._titles = batch, titles
        self._row, self._printed = 0, 0
        self._announce()

    def take(self, row: int, token: int) -> bool:
        """Take a row's next token; returns whether a stop text ends the row."""
        stopped = self._batch.take(row, token)
        self._print()
        return stopped

    def close(self) -> list[int]:
        """Print what is left; returns the rows that the limit cut."""
        cut = self._batch.close()
        self._print()
        return cut

    def _print(self) -> None:
        texts = self._batch.texts
        while self._row < len(texts):
            text = texts[self._row]
            print(text[self._printed :], end="", flush=True)
            self._printed = len(text)
            if self._row not in self._batch.ended:
                return
            print(flush=True)
            self._row, self._printed = self._row + 1, 0
            self._announce()

    def _announce(self) -> None:
        if self._row < len(self._titles):
            print(f"[{self._row + 1}] {self._titles[self._row]}", file=sys.stderr, flush=True)


def _converse(speaker: ChatSession, seed: int) -> None:
    """Answer line after line; each turn has a seed of its own."""
    messages: list[dict] = []
    for turn, line in enumerate(_lines()):
        messages.append(_message("user", line))
        prompt = encode_chat(speaker.tokenizer, messages)
        messages.append(_message("assistant", speaker.say([prompt], (seed + turn) % 2**32)[0]))


def _lines() -> Iterator[str]:
    """Yield what a user types, up to /exit or the end; empty lines say nothing."""
    shown = "> " if sys.stdin.isatty() else ""
    print("type a message; /exit or the end of input ends the conversation", file=sys.stderr)
    while True:
        print(shown, end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line or line.strip() == "/exit":
            return
        if line.strip():
            yield line.rstrip("\r\n")


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _text_problems(words: argparse.Namespace) -> list[str]:
    """Return a line for everything that is wrong with the texts of the command line."""
    problems = []
    if not words.prompt and not words.chat:
        problems.append("--prompt: got none, expected at least one --prompt TEXT, or --chat")
    for name, texts in (("--prompt", words.prompt), ("--stop", words.stop)):
        for text in texts:
            try:
                text.encode("utf-8")
            except UnicodeEncodeError:
                problems.append(f"{name}: got {text!a}, expected text in UTF-8")
    if "" in words.stop:
        problems.append("--stop: got an empty text, expected at least one character")
    return problems
