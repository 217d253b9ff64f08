# SPDX-License-Identifier: Apache-2.0
"""The rows of a run: tokenised, ordered, and those to evaluate on.

In: the `data` section and an `Assembly`. Out: loaders of batches, what happened to the rows in
words, and what tells them from others. Not done here: reading and tokenising (`data`).
"""

from dataclasses import dataclass, replace
from datetime import datetime

from dsjax.config import RunConfig, TrainingSection
from dsjax.data import Loader, decode_sample, find_tokenizer, load_training
from dsjax.distributed.mesh import check_batch, portions, process_rows
from dsjax.distributed.processes import Hosts
from dsjax.training.run_dir import (
    ResumePoint,
    split_as_before,
)
from dsjax.training.setup import Assembly


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
        """What tells these rows from others."""
        return {"data.train": self.fingerprint, "data.eval": self.eval_fingerprint}


def read_data(config: RunConfig, setup: Assembly, today: datetime) -> Data:
    """Tokenise all rows, as of the run's first day, and plan their order.

    Raises:
        ConfigError: a row, a file, or a batch that the devices do not divide.
    """
    training, section = config.training, config.data
    check_batch(training.batch_size, portions_of(training, setup), setup.mesh)
    tokenizer = find_tokenizer(setup.source.directory, section.format, today)
    vocabulary = setup.model.config.vocab_size
    rows = process_rows(setup.mesh, training.batch_size)
    examples, held_out = load_training(section, training.seed, tokenizer, vocabulary)
    loader = Loader(examples, section, training.batch_size, training.seed, rows)
    lines, evaluation, other = examples.report.lines(), None, ""
    if held_out is not None:
        ordered = section.model_copy(update={"shuffle": False})
        evaluation = Loader(held_out, ordered, training.batch_size, training.seed, rows)
        lines, other = lines + held_out.report.lines(), held_out.fingerprint
    sample = decode_sample(examples[0], tokenizer)
    return Data(loader, evaluation, lines, sample, examples.fingerprint, other)


def read_as_before(
    config: RunConfig, earlier: ResumePoint, setup: Assembly, today: datetime, hosts: Hosts
) -> tuple[RunConfig, Data]:
    """`read_data`, and the configuration by which it was read, which goes on with the run."""
    split = split_as_before(config, earlier, hosts)
    data = read_data(split, setup, today)
    return split, data if split is config else replace(data, eval=None, eval_fingerprint="")


def portions_of(training: TrainingSection, setup: Assembly) -> int:
    return portions(training.gradient_accumulation_steps, training.batch_size, setup.mesh)
