# SPDX-License-Identifier: Apache-2.0
"""Where generation stops: what the files name, and the token with which a template ends turns."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
from transformers import GenerationConfig

from dsjax.data import load_tokenizer
from dsjax.errors import ConfigError
from dsjax.weights.generation_config import (
    AddedStop,
    added_stop,
    stop_tokens,
    write_generation_config,
)
from dsjax.weights.load import open_checkpoint
from dsjax.weights.source import Source

OTHER = (tiny.SPECIAL_TOKENS[3], 3)
ENDS_WITH = "{{% for m in messages %}}{{{{ m.content }}}}{}{{% endfor %}}"


def source_of(
    folder: Path, generation: Any, eos_token_id: Any = 7, ending: str | None = None
) -> Source:
    """A checkpoint without weights, whose template ends turns with a text."""
    tiny.write_tokenizer(folder)
    config = {"eos_token_id": eos_token_id, "bos_token_id": 0}
    (folder / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    if ending is not None:
        (folder / "chat_template.jinja").write_text(ENDS_WITH.format(ending))
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        settings.pop("chat_template", None)
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return open_checkpoint(str(folder), weights=False)


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [5, 6]}, 7, {5, 6}),
        ({"eos_token_id": 5}, 7, {5}),
        ({}, 7, {7}),
        (None, [7, 8], {7, 8}),
        ({"eos_token_id": None}, None, {1}),
    ],
)
def test_stop_tokens_are_those_of_the_first_file_that_names_any(
    tmp_path: Path, generation, config, expected
):
    source = source_of(tmp_path, generation, config, "{{ eos_token }}")
    found = stop_tokens(source, load_tokenizer(tmp_path))
    assert found == expected | {1}  # the template ends turns with EOS, which is token 1


def test_the_templates_own_ending_is_a_stop_token(tmp_path: Path):
    ending, token = OTHER
    source = source_of(tmp_path, {"eos_token_id": 1, "temperature": 0.5}, ending=ending)
    assert added_stop(source) == AddedStop(token, ending, [1, token])
    assert stop_tokens(source, load_tokenizer(tmp_path)) == {1, token}

    (tmp_path / "out").mkdir()
    (tmp_path / "out/generation_config.json").write_bytes(
        (tmp_path / "generation_config.json").read_bytes()
    )
    write_generation_config(tmp_path / "out", source)
    written = GenerationConfig.from_pretrained(str(tmp_path / "out"))
    assert written.eos_token_id == [1, token] and written.temperature == 0.5


def test_an_export_without_generation_config_gets_one_only_where_something_is_missing(
    tmp_path: Path,
):
    (tmp_path / "out").mkdir()
    write_generation_config(tmp_path / "out", source_of(tmp_path, None, 1, "{{ eos_token }}"))
    assert not list((tmp_path / "out").iterdir())
    ending, token = OTHER
    write_generation_config(tmp_path / "out", source_of(tmp_path, None, 1, ending))
    written = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert written == {"bos_token_id": 0, "eos_token_id": [1, token]}


@pytest.mark.parametrize("ending", ["", "[/A]", "{{ 1 // 0 }}"])
def test_nothing_is_added_where_there_is_no_such_token(tmp_path: Path, ending):
    source = source_of(tmp_path, {"eos_token_id": 5}, ending=ending)
    assert added_stop(source) is None
    assert stop_tokens(source, load_tokenizer(tmp_path)) == {5}


def test_an_export_does_not_fail_by_files_that_the_run_did_not_read(tmp_path: Path):
    source = source_of(tmp_path, {"eos_token_id": "</s>"}, ending="x")
    assert added_stop(source) is None
    (tmp_path / "tokenizer.json").write_text("{")
    assert added_stop(source) is None
    (tmp_path / "tokenizer.json").unlink()
    assert added_stop(source) is None


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "got invalid JSON in {0} (Expecting property name"),
        ("[]", "got a JSON list in {0}, expected a JSON object"),
        ("[" * 5_000 + "]" * 5_000, "got invalid JSON in {0} (nested deeper"),
        ('{"eos_token_id": -1}', "{0} eos_token_id: got -1, expected an integer >= 0"),
        ('{"eos_token_id": [1, true]}', "{0} eos_token_id: got [1, True], expected an integer"),
        ('{"eos_token_id": "</s>"}', "{0} eos_token_id: got '</s>', expected"),
    ],
)
def test_a_damaged_generation_config_is_refused_by_name(tmp_path: Path, text: str, says: str):
    source = source_of(tmp_path, None)
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(ConfigError) as error:
        stop_tokens(source, load_tokenizer(tmp_path))
    assert says.format(tmp_path / "generation_config.json") in str(error.value)
