# SPDX-License-Identifier: Apache-2.0
"""Rows of the user's files -> tokens and loss weights -> batches that the train step takes.

In: files or hub datasets, the checkpoint's tokenizer, the `data` section.
Out: `Examples` (tokenised rows on disk, with a report of what happened to them) and a `Loader`
that plans order and packing for the whole run and gives this process its `Batch` of any step.
Not here: devices and shardings (`dsjax.distributed.sharding`), losses (`dsjax.objectives`).

The parts, in the order in which a row passes them: `sources` (patterns of paths, subsets),
`files` (source -> rows with their origin; it reads JSON by `json_reader` and CSV by `csv_reader`),
`columns` (the user's names), `formats` and `messages` (row -> messages, text or tokens),
`readings` (the forms that a template may want), `template` (the template at work, within the
`limits` of time and memory), `shown` (what it shows), `chat` (-> tokens), `examples` (tokens on
disk, length policy, report), `held_out` (rows to evaluate on), `packing` (global plan), `loader`
(batches).

A row's labels are its own tokens, each with a loss weight, 0 where a trainer of transformers would
have the label -100: `chat` makes them of messages, `examples` of text and tokens. `loader` shifts
them by one.
"""

from dsjax.data.chat import encode_chat
from dsjax.data.examples import DataReport, Examples, decode_sample, load_examples
from dsjax.data.held_out import load_evaluation, load_training
from dsjax.data.loader import Batch, Loader
from dsjax.data.sources import unused_keys
from dsjax.data.store import Example
from dsjax.data.template import Ending, turn_ending
from dsjax.data.tokenizer import encode_text, find_tokenizer, load_tokenizer

__all__ = [
    "Batch",
    "DataReport",
    "Ending",
    "Example",
    "Examples",
    "Loader",
    "decode_sample",
    "encode_chat",
    "encode_text",
    "find_tokenizer",
    "load_evaluation",
    "load_examples",
    "load_training",
    "unused_keys",
    "load_tokenizer",
    "turn_ending",
]
