# SPDX-License-Identifier: Apache-2.0
"""Patterns of paths, the user's own names of columns, and rows that are held out."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsjax.config import DataSection
from dsjax.config.inputs import find_sources
from dsjax.data import Examples, load_evaluation, load_examples, load_training
from dsjax.data.columns import COLUMNS, Columns
from dsjax.data.held_out import held_out_rows
from dsjax.data.sources import unused_keys
from dsjax.errors import ConfigError


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def ids(examples: Examples) -> list[int]:
    return [int(examples[number].input_ids[0]) for number in range(len(examples))]


def test_patterns_name_files_in_order(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "sub/deep/c.jsonl", "sub/d.txt", "x[1].jsonl"):
        write(tmp_path / name, [{"text": "a"}])

    def found(pattern: str) -> list[str]:
        names = find_sources(f"{tmp_path}/{pattern}", "data.train[0]")
        return [name.removeprefix(f"{tmp_path}/") for name in names]

    assert found("?.jsonl") == ["a.jsonl", "b.jsonl"]
    assert found("**/*.jsonl") == ["a.jsonl", "b.jsonl", "sub/deep/c.jsonl", "x[1].jsonl"]
    assert found("sub/**") == ["sub/d.txt", "sub/deep/c.jsonl"]
    assert found("x[1].jsonl") == ["x[1].jsonl"]  # a file of that very name
    assert found("[ab].jsonl") == ["a.jsonl", "b.jsonl"]
    assert find_sources("owner/rows", "data.train[0]") == ["owner/rows"]
    with pytest.raises(ConfigError) as caught:
        found("none*.jsonl")
    assert str(caught.value).startswith(f"data.train[0]: got {tmp_path}/none*.jsonl, which matches")


def test_the_files_of_a_pattern_are_read_and_reported(tmp_path):
    for name, first in (("b", 7), ("a", 5)):
        write(tmp_path / f"{name}.jsonl", [{"input_ids": [first, 1]}])
    section = DataSection(train=[f"{tmp_path}/*.jsonl"])
    examples = load_examples(section.train, section, None)
    assert ids(examples) == [5, 7]
    assert examples.report.lines()[:2] == [
        f"data.train: {tmp_path}/a.jsonl: 1 rows, format tokens",
        f"data.train: {tmp_path}/b.jsonl: 1 rows, format tokens",
    ]


def test_columns_are_read_under_the_users_names(tmp_path, tokenizers):
    mapping = {"instruction": "question", "output": "answer"}
    theirs = write(tmp_path / "a.jsonl", [{"question": "q", "answer": "a"}])
    ours = write(tmp_path / "b.jsonl", [{"instruction": "q", "output": "a"}])
    chats = tmp_path / "c.csv"
    said = json.dumps([{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}])
    chats.write_text('talk\n"' + said.replace('"', '""') + '"\n')
    section = DataSection(
        train=[theirs, str(chats)], column_mapping=mapping | {"conversations": "talk"}
    )
    mapped = load_examples(section.train, section, tokenizers["v3"])
    plain = DataSection(train=[ours])
    expected = load_examples(plain.train, plain, tokenizers["v3"])[0]
    for number in (0, 1):
        assert mapped[number].input_ids.tolist() == expected.input_ids.tolist()
    assert mapped[0].loss_weights.tolist() == expected.loss_weights.tolist()


@given(
    fields=st.dictionaries(st.sampled_from(["a", "b", "text", "output", "system"]), st.integers()),
    mapping=st.dictionaries(
        st.sampled_from(COLUMNS), st.sampled_from(["a", "b", "text", "output"]), max_size=4
    ),
)
def test_a_mapping_loses_and_doubles_nothing(fields, mapping):
    try:
        named = Columns(mapping).rename(fields, "f:1")
    except ConfigError as error:
        assert str(error).startswith("f:1: got ")
        return
    for ours, theirs in mapping.items():
        if theirs in fields:
            assert named[ours] == fields[theirs]
    kept = {key: value for key, value in fields.items() if key not in mapping.values()}
    assert kept.items() <= named.items()
    assert set(named) == set(kept) | {ours for ours, name in mapping.items() if name in fields}


def test_a_row_with_both_names_is_refused():
    with pytest.raises(ConfigError, match="f:3: got text and body, expected one of them") as caught:
        Columns({"text": "body"}).rename({"text": "a", "body": "b"}, "f:3")
    assert str(caught.value).endswith(
        "; to read text itself, take `text: body` out of data.column_mapping; to read body, remove "
        "the column text from the data"
    )


def test_keys_of_hub_datasets_are_unused_without_one(tmp_path):
    rows = write(tmp_path / "a.jsonl", [{"text": "a"}])
    assert unused_keys(DataSection(train=[rows], subset="en")) == ["data.subset"]
    assert unused_keys(DataSection(train=[rows, "owner/rows"], subset="en", split="x")) == []


@pytest.mark.parametrize(("size", "held"), [(3, 3), (0.1, 4), (0.07, 3), (0.95, 38)])
def test_rows_are_held_out_by_number_or_share(tmp_path, size, held):
    paths = [
        write(
            tmp_path / f"{part}.jsonl", [{"input_ids": [20 * part + row, 1]} for row in range(20)]
        )
        for part in range(2)
    ]
    section = DataSection(train=paths, val_size=size)
    train, evaluation = load_training(section, 42, None)
    assert evaluation is not None
    assert (len(train), len(evaluation)) == (40 - held, held)
    assert sorted(ids(train) + ids(evaluation)) == list(range(40))
    assert ids(train) == sorted(ids(train))  # in the order of the files
    again, other = load_evaluation(section, 42, None), load_evaluation(section, 43, None)
    assert again is not None and other is not None
    assert again.fingerprint == evaluation.fingerprint != other.fingerprint
    assert f"data.val_size: {held} rows -> {held} sequences" in "\n".join(evaluation.report.lines())


def test_the_rows_held_out_stay_the_same_for_good(tmp_path):
    # A resumed run relies on it: they must not change with numpy or with this package.
    path = write(tmp_path / "a.jsonl", [{"input_ids": [row, 1]} for row in range(12)])
    held = held_out_rows(DataSection(train=[path], val_size=4), seed=42)
    assert np.flatnonzero(held).tolist() == [2, 5, 7, 9]


def test_a_conversation_is_on_one_side(tmp_path, tokenizers):
    turns = [{"role": role, "content": "x"} for role in ("user", "assistant") * 2]
    path = write(tmp_path / "a.jsonl", [{"messages": turns}] * 6)
    train, evaluation = load_training(DataSection(train=[path], val_size=2), 1, tokenizers["r1"])
    assert evaluation is not None
    assert (train.report.rows, len(train), train.report.split) == (4, 8, 4)
    assert (evaluation.report.rows, len(evaluation)) == (2, 4)


def test_without_val_size_nothing_is_held_out(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"input_ids": [1, 2]}])
    train, evaluation = load_training(DataSection(train=[path]), 1, None)
    assert len(train) == 1 and evaluation is None
