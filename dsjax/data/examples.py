# SPDX-License-Identifier: Apache-2.0
"""Sources -> tokenised examples, and the account of what happened to every row.

In: the sources and policies of the `data` section, a tokenizer (none for `format: tokens`).
Out: `Examples`, read by index, with a `DataReport` that a run prints. Plain text gets BOS if the
tokenizer adds one, and EOS; rows of tokens are used as they are. Over-long rows are cut at the end,
dropped, or refused, and counted. Not here: order, packing, batches (`packing`, `loader`).
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
from jaxtyping import Bool
from transformers import PreTrainedTokenizerFast

from dsjax.config import DataSection
from dsjax.data import reasoning
from dsjax.data.chat import chat_examples
from dsjax.data.columns import Columns
from dsjax.data.formats import (
    IGNORED_LABEL,
    Chat,
    Content,
    Pretokenized,
    Text,
    detect_format,
    parse_row,
    unread_keys,
)
from dsjax.data.reasoning import Answer, Encoded
from dsjax.data.sources import Source, open_sources
from dsjax.data.store import Example, ExampleStore
from dsjax.data.template import EndlessError, turn_ending, without_end
from dsjax.data.tokenizer import encode_text
from dsjax.errors import ConfigError, raise_all

SHOWN_PROBLEMS = 8
MOST_KEYS = 12
TRAINED_MARKS = ("⟦", "⟧")


@dataclass
class DataReport:
    """Counts over all sources. `rows` were read; `sequences` are kept, after splits and drops."""

    name: str
    sources: list[tuple[str, Counter[str]]] = field(default_factory=list)
    """Each with its rows by format."""
    rows: int = 0
    sequences: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    longest: int = 0
    split: int = 0
    truncated: int = 0
    dropped: int = 0
    untrained: int = 0
    ended_inside: int = 0
    unread: Counter[str] = field(default_factory=Counter)
    answers: Counter[str] = field(default_factory=Counter)
    """Trained ones by their kind (`reasoning`), where the template asks for reasoning."""
    ending: str = ""

    def lines(self) -> list[str]:
        """Return the report as lines of text."""
        lines = [
            f"{self.name}: {source}: {forms.total():,} rows, {_formats(forms)}"
            for source, forms in self.sources
        ]
        share = 100 * self.trained_tokens / max(self.tokens, 1)
        lines.append(
            f"{self.name}: {self.rows:,} rows -> {self.sequences:,} sequences, "
            f"{self.tokens:,} tokens, {self.trained_tokens:,} trained ({share:.1f} %), "
            f"longest {self.longest:,}"
        )
        lines.append(
            f"{self.name}: over-long: {self.truncated:,} truncated, {self.dropped:,} dropped; "
            f"{self.untrained:,} without a trained token; "
            f"{self.split:,} conversations split over several sequences"
        )
        if self.ended_inside:
            lines.append(f"{self.name}: {self.ended_inside:,} texts hold EOS before their end")
        lines += [f"{self.name}: {line}" for line in reasoning.lines(self.answers)]
        if self.unread:
            keys = [f"{key} ({count:,} rows)" for key, count in self.unread.most_common(MOST_KEYS)]
            more = ", ..." if len(self.unread) > MOST_KEYS else ""
            lines.append(f"{self.name}: keys that are not read: {', '.join(keys)}{more}")
        if self.ending:
            lines.append(f"{self.name}: {self.ending}")
        return lines


def _formats(forms: Counter[str]) -> str:
    if len(forms) == 1:
        return f"format {next(iter(forms))}"
    return "formats " + ", ".join(f"{form} ({rows:,})" for form, rows in forms.items())


RowProgress = Callable[[str, int], None]


def no_row_progress(name: str, rows: int) -> None:
    """Tell nobody."""


class Examples(ExampleStore):
    """Tokenised examples on disk, with the report of how they came about."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.report = DataReport(name)


def load_examples(
    sources: Sequence[str],
    section: DataSection,
    tokenizer: PreTrainedTokenizerFast | None,
    vocab_size: int | None = None,
    name: str = "data.train",
    kept: Bool[np.ndarray, " N"] | None = None,
    progress: RowProgress = no_row_progress,
) -> Examples:
    """Read, tokenise and check all rows of several sources, in order.

    Args:
      sources: files and hub datasets: `section.train` or `section.eval`.
      section: format, max_length, overlong, split, subset and column_mapping.
      tokenizer: from `load_tokenizer`; None is enough for rows of tokens.
      vocab_size: rows of the model's embedding; every token must lie below it.
      name: config path of `sources`, for messages.
      kept: which of all rows to load; None: all.
      progress: told `name` and the rows so far.

    Raises:
      ConfigError: a source or row is wrong (several rows in one message), or nothing is left.
    """
    examples = Examples(name)
    encoder = _RowEncoder(section, tokenizer, vocab_size, examples, kept, progress)
    columns = Columns(section.column_mapping)
    for source in open_sources(sources, section, name, columns):
        encoder.read(source)
    # Rows to evaluate on may have our names already.
    unmet = columns.problems() if name == "data.train" else []
    raise_all(unmet + encoder.problems + encoder.more_problems() + encoder.refusals())
    examples.finalize()
    _check_left(examples.report, section)
    return examples


def decode_sample(example: Example, tokenizer: PreTrainedTokenizerFast | None) -> str:
    """Return an example as text, each trained part between ⟦ and ⟧ (token ids, if no tokenizer)."""
    trained = example.loss_weights != 0
    # The first token is never predicted, whatever its weight.
    trained = trained & (np.arange(len(trained)) > 0)
    cuts = np.flatnonzero(np.diff(trained)) + 1
    text = ""
    for ids, mark in zip(np.split(example.input_ids, cuts), np.split(trained, cuts), strict=True):
        part = " ".join(map(str, ids)) if tokenizer is None else str(tokenizer.decode(ids))
        text += f"{TRAINED_MARKS[0]}{part}{TRAINED_MARKS[1]}" if mark[0] else part
    return text


class _RowEncoder:
    """Tokenises rows, applies `data.max_length` and `data.overlong`, stores and counts."""

    def __init__(
        self,
        section: DataSection,
        tokenizer: PreTrainedTokenizerFast | None,
        vocab_size: int | None,
        examples: Examples,
        kept: Bool[np.ndarray, " N"] | None,
        progress: RowProgress,
    ) -> None:
        self._section, self._examples, self._progress = section, examples, progress
        self._kept, self._number = kept, 0  # of rows, over all sources
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self.problems: list[str] = []
        self._wrong_count = 0
        self._refused: list[str] = []
        self._refused_count = 0

    def read(self, source: Source) -> None:
        """Take in one source; what is wrong with its rows is collected in `problems`."""
        report, forms = self._examples.report, Counter[str]()
        before = self._number
        try:
            for origin, fields in source.rows:
                self._number += 1
                if not self._is_kept(self._number - 1):
                    continue
                report.rows += 1
                self._progress(report.name, report.rows)
                self._add(fields, forms, origin)
        except EndlessError:
            raise
        except ConfigError as error:
            self.problems.append(str(error))
        if self._number == before and not self.problems:
            self.problems.append(
                f"{source.field}: got {source.name} without a row, expected at least one"
            )
        if forms:
            report.sources.append((source.name, forms))

    def _is_kept(self, number: int) -> bool:
        return self._kept is None or (number < len(self._kept) and bool(self._kept[number]))

    def more_problems(self) -> list[str]:
        """Return the count of wrong rows, if not all of them are in `problems`."""
        if self._wrong_count <= SHOWN_PROBLEMS:
            return []
        report = self._examples.report
        return [
            f"{report.name}: got {self._wrong_count:,} such rows of {report.rows:,}, expected "
            f"none; the first {SHOWN_PROBLEMS} are above"
        ]

    def refusals(self) -> list[str]:
        """Return the refusal of over-long rows, if any."""
        if not self._refused_count:
            return []
        return [
            f"data.overlong: got {self._refused_count:,} rows longer than data.max_length = "
            f"{self._section.max_length} ({', '.join(self._refused)}), expected none with `error`; "
            "raise data.max_length, or set data.overlong to truncate or drop"
        ]

    def _add(self, fields: dict[str, Any], forms: Counter[str], origin: str) -> None:
        form = self._section.format
        try:
            # Of each row by itself: a file may hold rows of several formats.
            form = detect_format(fields, origin) if form == "auto" else form
            forms[form] += 1
            content = parse_row(fields, form, origin, chosen=self._section.format != "auto")
            made = _encode(content, self._tokenizer, origin)
            _check_vocabulary([each.example for each in made], self._vocab_size, origin)
        except EndlessError:  # the next rows would take as long
            raise
        except ConfigError as error:
            self._wrong_count += 1
            if self._wrong_count <= SHOWN_PROBLEMS:
                self.problems.append(str(error))
            return
        self._tell(content, fields, form)
        self._examples.report.split += len(made) > 1
        for example, answers in made:
            kept = self._fit(example, origin)
            if kept is not None:
                self._keep(kept, answers)

    def _tell(self, content: Content, fields: dict[str, Any], form: str) -> None:
        """Note what of a row is not as the user may think."""
        report, tokenizer = self._examples.report, self._tokenizer
        report.unread.update(unread_keys(fields, form))
        if isinstance(content, Text) and len(content.pieces) == 1 and tokenizer is not None:
            eos = str(tokenizer.eos_token)
            report.ended_inside += eos in without_end(content.pieces[0][0], [eos])
        if isinstance(content, Chat) and tokenizer is not None:
            report.ending = _other_ending(tokenizer)

    def _fit(self, example: Example, origin: str) -> Example | None:
        length, limit = len(example.input_ids), self._section.max_length
        if length <= limit:
            return example
        if self._section.overlong == "truncate":
            self._examples.report.truncated += 1
            return example.cut(limit)
        if self._section.overlong == "drop":
            self._examples.report.dropped += 1
            return None
        self._refused_count += 1
        if len(self._refused) < SHOWN_PROBLEMS:
            self._refused.append(f"{origin}: {length} tokens")
        return None

    def _keep(self, example: Example, answers: Sequence[Answer]) -> None:
        report, trained = self._examples.report, example.trained()
        length = len(example.input_ids)
        report.sequences += 1
        report.tokens += length
        report.trained_tokens += trained
        report.untrained += not trained
        report.longest = max(report.longest, length)
        report.answers.update(answer.kind for answer in answers if answer.start < length)
        self._examples.append(example)


def _encode(
    content: Content, tokenizer: PreTrainedTokenizerFast | None, origin: str
) -> list[Encoded]:
    """Give each token its label, itself or the row's own, and its loss weight."""
    if isinstance(content, Pretokenized):
        trained = content.labels != IGNORED_LABEL
        labels = np.where(trained, content.labels, 0).astype(np.int32)
        example = Example(content.input_ids, labels, trained.astype(np.float32))
        return [Encoded(example, [])]
    if tokenizer is None:
        raise ConfigError(
            f"{origin}: got text and a model without tokenizer, expected tokenizer.json beside the "
            "weights; copy it there, or give rows of the format tokens (input_ids)"
        )
    if isinstance(content, Chat):
        return chat_examples(tokenizer, content, origin)
    return [Encoded(_text_example(content, tokenizer, origin), [])]


def _text_example(content: Text, tokenizer: PreTrainedTokenizerFast, origin: str) -> Example:
    """Tokenise each piece alone, as a prompt is at inference, with BOS before and EOS after."""
    eos = cast(int | None, tokenizer.eos_token_id)
    if eos is None:
        raise ConfigError(
            f"{origin}: got text and a tokenizer without EOS, expected `eos_token` in "
            "tokenizer_config.json to end it with"
        )
    ids: list[int] = []
    weights: list[float] = []
    *before, (last, trained) = content.pieces
    last = without_end(last, [str(tokenizer.eos_token)])
    if before and str(tokenizer.eos_token) in last:
        raise ConfigError(
            f"{origin} completion: got text with {tokenizer.eos_token} in it, expected that at "
            "most at the end, for generation ends there; take it out, or make rows of the parts"
        )
    for index, (text, weight) in enumerate([*before, (last, trained)]):
        piece = encode_text(tokenizer, text, add_bos=index == 0)
        ids += piece
        weights += [weight] * len(piece)
    ids.append(eos)
    weights.append(trained)
    tokens = np.array(ids, np.int32)
    return Example(tokens, tokens, np.array(weights, np.float32))


def _other_ending(tokenizer: PreTrainedTokenizerFast) -> str:
    """Say how turns end where that is not with EOS."""
    ending = turn_ending(tokenizer)
    if ending is None or not ending.text.strip() or ending.token == tokenizer.eos_token_id:
        return ""
    if ending.token is None:
        return (
            f"the chat template ends turns with {ending.text!r}, which is no token: generation "
            "does not stop there by itself, give it that as a stop text"
        )
    name = tokenizer.convert_ids_to_tokens(ending.token)
    return (
        f"the chat template ends turns with {name} (token {ending.token}), not with EOS "
        f"{tokenizer.eos_token}: generation and the export's generation_config.json stop there too"
    )


def _check_vocabulary(made: list[Example], vocab_size: int | None, origin: str) -> None:
    """Refuse an id beyond the embedding: JAX would clamp it to the last row, and say nothing."""
    for example in made:
        for name in ("input_ids", "labels"):
            values = getattr(example, name)
            bad = (values < 0) | (values >= (vocab_size or np.iinfo(np.int32).max))
            if bad.any():
                index = int(np.argmax(bad))
                raise ConfigError(
                    f"{origin} {name}[{index}]: got {values[index]}, expected a token id from 0 to "
                    f"{(vocab_size or 0) - 1 if vocab_size else '2147483646'}; the tokenizer or "
                    "the file belongs to another model"
                )


def _check_left(report: DataReport, section: DataSection) -> None:
    if not report.sequences:
        raise ConfigError(
            f"{report.name}: got {report.rows:,} rows, all longer than data.max_length = "
            f"{section.max_length} and dropped, expected some to be left; raise data.max_length"
        )
    if not report.trained_tokens:
        raise ConfigError(
            f"{report.name}: got {report.sequences:,} sequences without one trained token "
            f"({report.truncated:,} were truncated to data.max_length = {section.max_length}), "
            "expected some; check loss_weight, labels and data.max_length"
        )
