# SPDX-License-Identifier: Apache-2.0
"""What a run trains on and what it evaluates on; `data.val_size` parts the rows of `data.train`.

In: the `data` section and the run's seed. Out: tokenised examples of both. Which rows are held out
is a function of their number, `data.val_size` and the seed, so a resumed run, and evaluation later,
find the same. A row is wholly on one side, however many sequences it becomes.
Not here: reading and tokenising (`examples`).
"""

import math

import numpy as np
from jaxtyping import Bool
from transformers import PreTrainedTokenizerFast

from dsjax.config import DataSection
from dsjax.data.columns import Columns
from dsjax.data.examples import Examples, RowProgress, load_examples, no_row_progress
from dsjax.data.sources import open_sources
from dsjax.errors import ConfigError


def load_training(
    section: DataSection,
    seed: int,
    tokenizer: PreTrainedTokenizerFast | None,
    vocab_size: int | None = None,
    progress: RowProgress = no_row_progress,
) -> tuple[Examples, Examples | None]:
    """Load what is trained on, and what is evaluated on, if anything; see `load_examples`.

    Raises:
      ConfigError: a source or row is wrong, or nothing is left on one side.
    """
    if section.val_size is None:
        train = load_examples(
            section.train, section, tokenizer, vocab_size, "data.train", None, progress
        )
        return train, load_evaluation(section, seed, tokenizer, vocab_size, progress)
    held = held_out_rows(section, seed)
    train = load_examples(
        section.train, section, tokenizer, vocab_size, "data.train", ~held, progress
    )
    evaluation = load_examples(
        section.train, section, tokenizer, vocab_size, "data.val_size", held, progress
    )
    if train.report.rows + evaluation.report.rows != len(held):
        raise ConfigError(
            f"data.train: got {train.report.rows + evaluation.report.rows:,} rows after "
            f"{len(held):,}, expected files that do not change while they are read"
        )
    return train, evaluation


def load_evaluation(
    section: DataSection,
    seed: int,
    tokenizer: PreTrainedTokenizerFast | None,
    vocab_size: int | None = None,
    progress: RowProgress = no_row_progress,
) -> Examples | None:
    """Load what is evaluated on: `data.eval`, or what `data.val_size` holds out."""
    if section.eval is not None:
        return load_examples(
            section.eval, section, tokenizer, vocab_size, "data.eval", None, progress
        )
    if section.val_size is None:
        return None
    held = held_out_rows(section, seed)
    return load_examples(
        section.train, section, tokenizer, vocab_size, "data.val_size", held, progress
    )


def held_out_rows(section: DataSection, seed: int) -> Bool[np.ndarray, " N"]:
    """Draw the rows of `data.train` that are held out.

    Raises:
      ConfigError: none would be left to train on, or a row cannot be read.
    """
    assert section.val_size is not None
    opened = open_sources(section.train, section, "data.train", Columns(section.column_mapping))
    count = sum(1 for source in opened for _ in source.rows)
    size = section.val_size
    if isinstance(size, float):  # rounded first: a share of 0.07 of 100 rows is 7, not the 8 above
        size = math.ceil(round(size * count, 6))
    if not 0 < size < count:
        raise ConfigError(
            f"data.val_size: got {section.val_size}, which is {size:,} of the {count:,} rows of "
            "data.train, expected to hold out at least one and to leave at least one"
        )
    # As in `packing`: numpy keeps the raw bits of this generator the same in all versions.
    bits = np.random.Philox(np.random.SeedSequence(seed, spawn_key=(1,)))
    held = np.zeros(count, np.bool_)
    held[np.argsort(bits.random_raw(count), kind="stable")[:size]] = True
    return held
