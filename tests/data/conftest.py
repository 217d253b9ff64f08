# SPDX-License-Identifier: Apache-2.0
"""Tokenizers with the templates of each family, and files of rows to load."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_tokenizers import TEMPLATES, write_tokenizer
from transformers import PreTrainedTokenizerFast

from dsjax.config import DataSection
from dsjax.data import Examples, load_examples, load_tokenizer


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, PreTrainedTokenizerFast]:
    """One tokenizer for each family of templates."""
    root = tmp_path_factory.mktemp("tokenizers")
    return {
        name: load_tokenizer(write_tokenizer(root / name, template))
        for name, template in TEMPLATES.items()
    }


@pytest.fixture
def tokenizer_folder(tmp_path: Path) -> Callable[..., Path]:
    """Write a tokenizer that has a given chat template and settings."""
    return lambda template, **settings: write_tokenizer(tmp_path / "tok", template, **settings)


@pytest.fixture
def with_template(
    tokenizer_folder: Callable[..., Path],
) -> Callable[..., PreTrainedTokenizerFast]:
    """Load a tokenizer that has a given chat template and settings."""
    return lambda template, **settings: load_tokenizer(tokenizer_folder(template, **settings))


@pytest.fixture
def load_rows(tmp_path: Path) -> Callable[..., Examples]:
    """Load rows through a JSONL file `rows.jsonl` in tmp_path."""

    def load(
        rows: list[Any],
        tokenizer: PreTrainedTokenizerFast | None = None,
        vocab_size: int | None = None,
        **section: Any,
    ) -> Examples:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        settings = DataSection(train=[str(path)], **section)
        return load_examples(settings.train, settings, tokenizer, vocab_size)

    return load
