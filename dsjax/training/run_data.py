# SPDX-License-Identifier: Apache-2.0
"""The rows of a run or of an evaluation: tokenised, ordered, and those to evaluate on.

In: the `data` section and an `Assembly`. Out: loaders of batches, what happened to the rows in
words, and what tells them from others. Not done here: reading and tokenising (`data`).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from typing import TypeVar

from transformers import PreTrainedTokenizerFast

from dsjax.config import RunConfig
from dsjax.data import Examples, Loader, decode_sample, find_tokenizer, load_training
from dsjax.distributed.mesh import check_batch, check_length, length_multiple, process_rows
from dsjax.distributed.processes import Hosts
from dsjax.training.console import working
from dsjax.training.resume import ResumePoint, split_as_before
from dsjax.training.setup import Assembly

T = TypeVar("T")


@dataclass(frozen=True)
class Data:
    """What a run reads."""

    train: Loader
    eval: Loader | None
    lines: list[str]
    sample: str
    fingerprint: str
    eval_fingerprint: str

    def digests(self) -> dict[str, str]:
        """Return what tells these rows from others."""
        return {"data.train": self.fingerprint, "data.eval": self.eval_fingerprint}


def read_rows(
    config: RunConfig, setup: Assembly, today: datetime, load: Callable[..., T], pieces: int = 1
) -> tuple[T, PreTrainedTokenizerFast | None]:
    """Tokenise rows of the `data` section, once the batch is known to fit the devices.

    Args:
        config: the run's.
        setup: its model, for the tokenizer, the vocabulary and the mesh.
        today: the day that a chat template may write.
        load: `load_training` or `load_evaluation`.
        pieces: that a batch is split into, one after the other.

    Returns:
        What `load` gives, and the tokenizer.

    Raises:
        ConfigError: a row, a file, or a batch that the devices do not divide.
    """
    section, seed = config.data, config.training.seed
    check_batch(config.training.batch_size, pieces, setup.mesh)
    check_length(section.max_length, setup.mesh)
    tokenizer = find_tokenizer(setup.source.directory, section.format, today)
    return load(section, seed, tokenizer, setup.model.config.vocab_size), tokenizer


def make_loader(config: RunConfig, setup: Assembly, examples: Examples, shuffle: bool) -> Loader:
    """Plan the order of rows, those of the files unless shuffled, and take this process's part."""
    section, training = config.data.model_copy(update={"shuffle": shuffle}), config.training
    rows = process_rows(setup.mesh, training.batch_size)
    multiple = length_multiple(setup.mesh)
    return Loader(examples, section, training.batch_size, training.seed, rows, multiple)


def read_data(config: RunConfig, setup: Assembly, today: datetime, primary: bool = True) -> Data:
    """Tokenise all rows, as of the run's first day, and plan their order.

    The `primary` process says how far it is.

    Raises:
        ConfigError: a row, a file, or a batch that the devices do not divide.
    """
    asked = config.training.gradient_accumulation_steps
    pieces = 1 if asked == "auto" else asked  # auto follows the rows, and divides what devices do
    with working("reading rows", primary) as tell:
        load = partial(load_training, progress=lambda name, rows: tell(f"{rows:,} of {name}"))
        (examples, held_out), tokenizer = read_rows(config, setup, today, load, pieces)
    train = make_loader(config, setup, examples, config.data.shuffle)
    lines, evaluation, other = examples.report.lines(), None, ""
    if held_out is not None:
        evaluation = make_loader(config, setup, held_out, shuffle=False)
        lines, other = lines + held_out.report.lines(), held_out.fingerprint
    sample = decode_sample(examples[0], tokenizer)
    return Data(train, evaluation, lines, sample, examples.fingerprint, other)


def read_as_before(
    config: RunConfig, earlier: ResumePoint, setup: Assembly, today: datetime, hosts: Hosts
) -> tuple[RunConfig, Data]:
    """`read_data` as the run began; return the configuration by which it was read as well."""
    split = split_as_before(config, earlier, hosts)
    data = read_data(split, setup, today, hosts.primary)
    return split, data if split is config else replace(data, eval=None, eval_fingerprint="")
