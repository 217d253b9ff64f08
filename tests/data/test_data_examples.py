# SPDX-License-Identifier: Apache-2.0
"""From rows to stored examples: text, tokens, length policies, the report, and all refusals."""

import json
import zlib
from collections import Counter

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsjax.config import DataSection
from dsjax.data import decode_sample, load_examples
from dsjax.data.store import Example, ExampleStore
from dsjax.errors import ConfigError

TOKENS = {"format": "tokens"}
SAID = {"role": "assistant", "content": "a"}


def test_text_gets_bos_and_eos_and_is_trained_whole(with_template, load_rows):
    tokenizer = with_template(None, add_bos_token=True)
    examples = load_rows([{"text": "a b"}], tokenizer)
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    assert decode_sample(examples[0], tokenizer) == f"{bos}⟦a b{eos}⟧"
    assert examples[0].trained() == 4


def test_completion_and_eos_are_trained(with_template, load_rows):
    tokenizer = with_template(None, add_bos_token=True)
    examples = load_rows([{"prompt": "a:", "completion": "\nb"}], tokenizer)
    # The prompt is tokenised alone, as at inference: ":\n" does not become one token.
    expected = f"{tokenizer.bos_token}a:⟦\nb{tokenizer.eos_token}⟧"
    assert decode_sample(examples[0], tokenizer) == expected


def test_rows_of_tokens_are_used_as_they_are(load_rows):
    examples = load_rows([{"input_ids": [5, 6, 7], "labels": [-100, -100, 4]}, {"input_ids": [8]}])
    assert [field.tolist() for field in examples[0]] == [[5, 6, 7], [0, 0, 4], [0, 0, 1]]
    assert [field.tolist() for field in examples[1]] == [[8], [8], [1]]
    assert examples.lengths.tolist() == [3, 1]


def test_sources_follow_one_another_and_are_reported(tmp_path, tokenizers):
    first, second = tmp_path / "a.jsonl", tmp_path / "b.json"
    first.write_text(json.dumps({"text": "abc"}) + "\n")
    second.write_text(json.dumps([{"instruction": "q", "input": "", "output": "a"}] * 2))
    section = DataSection(train=[str(first), str(second)])
    examples = load_examples(section.train, section, tokenizers["r1"])
    assert len(examples) == 3
    assert examples.report.lines() == [
        f"data.train: {first}: 1 rows, format text",
        f"data.train: {second}: 2 rows, format alpaca",
        "data.train: 3 rows -> 3 sequences, 28 tokens, 15 trained (53.6 %), longest 12",
        "data.train: over-long: 0 truncated, 0 dropped; 0 without a trained token; "
        "0 conversations split over several sequences",
        "data.train: 2 of 2 answers are without reasoning: the chat template opens <think>, and "
        "the model learns </think> at once; what it should think first belongs in "
        "reasoning_content",
    ]


def test_every_row_is_of_its_own_format(tmp_path, tokenizers, load_rows):
    chat = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    rows = [
        chat,
        {"text": "plain"},
        {"input_ids": [5, 6]},
        chat,
        {"instruction": "q", "output": ""},
    ]
    mixed = load_rows(rows, tokenizers["v3"])
    assert mixed.report.lines()[0] == (
        f"data.train: {tmp_path}/rows.jsonl: 5 rows, formats messages (2), text (1), tokens (1), "
        "alpaca (1)"
    )
    for number, row in enumerate(rows):
        alone = load_rows([row, {"text": "x"}], tokenizers["v3"])[0]
        assert [field.tolist() for field in mixed[number]] == [field.tolist() for field in alone]


@given(
    rows=st.lists(
        st.sampled_from(
            [
                ("messages", {"messages": [{"role": "user", "content": "q"}, SAID], "text": None}),
                ("sharegpt", {"conversations": [{"from": "human", "value": "q"}, SAID]}),
                ("alpaca", {"instruction": "q", "output": "a", "messages": None}),
                ("prompt_completion", {"prompt": "q", "completion": "a"}),
                ("text", {"text": "a"}),
                ("tokens", {"input_ids": [5, 6]}),
            ]
        ),
        min_size=1,
        max_size=12,
    )
)
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_order_of_formats_is_counted_by_row(tokenizers, load_rows, rows):
    examples = load_rows([fields for _, fields in rows], tokenizers["v3"])
    assert len(examples) == len(rows)
    assert dict(examples.report.sources[0][1]) == Counter(form for form, _ in rows)


def test_rows_without_a_format_are_named_together(load_rows):
    with pytest.raises(ConfigError) as caught:
        load_rows([{"q": 1}, {"input_ids": [1, 2]}, {"r": 1}])
    assert [line.split(":")[1] for line in str(caught.value).splitlines()] == ["1", "3"]


def test_splits_of_conversations_are_counted(tokenizers, load_rows):
    turns = [{"role": role, "content": "x"} for role in ("user", "assistant") * 2]
    report = load_rows([{"messages": turns}], tokenizers["r1"]).report
    assert (report.rows, report.sequences, report.split) == (1, 2, 1)


def test_truncate_counts_what_it_cuts(load_rows):
    rows = [
        {"input_ids": [1, 2, 3, 4]},
        {"input_ids": [1, 2, 3, 4], "labels": [-100, -100, -100, 4]},
        {"input_ids": [1, 2]},
    ]
    examples = load_rows(rows, max_length=3)
    assert examples.lengths.tolist() == [3, 3, 2]
    report = examples.report
    assert (report.truncated, report.untrained, report.tokens) == (2, 1, 8)
    assert report.trained_tokens == 2 + 0 + 1  # a row's first token is never predicted


def test_drop_counts_what_it_drops(load_rows):
    examples = load_rows(
        [{"input_ids": [1, 2, 3]}, {"input_ids": [1, 2]}], max_length=2, overlong="drop"
    )
    assert len(examples) == 1 and examples.report.dropped == 1


def test_error_names_every_long_row(tmp_path, load_rows):
    rows = [{"input_ids": [1, 2, 3]}, {"input_ids": [1, 2]}, {"input_ids": [1] * 4}]
    with pytest.raises(ConfigError) as caught:
        load_rows(rows, max_length=2, overlong="error")
    assert str(caught.value).startswith(
        "data.overlong: got 2 rows longer than data.max_length = 2 "
        f"({tmp_path}/rows.jsonl:1: 3 tokens, {tmp_path}/rows.jsonl:3: 4 tokens)"
    )


@pytest.mark.parametrize(
    ("rows", "section", "message"),
    [
        ([], {}, "data.train[0]: got {0} without a row, expected at least one"),
        (
            [{"input_ids": [1, 2, 3]}],
            {"max_length": 2, "overlong": "drop"},
            "data.train: got 1 rows, all longer than data.max_length = 2 and dropped",
        ),
        (
            [{"input_ids": [1, 2], "labels": [-100, -100]}],
            {},
            "data.train: got 1 sequences without one trained token (0 were truncated",
        ),
        ([{"text": "a"}], {}, "{0}:1: got text and a model without tokenizer, expected tokenizer"),
        ([{"text": "a"}], TOKENS, "{0}:1: got the keys text, expected also input_ids for the form"),
        (
            [{"input_ids": [1, 10]}],
            {},
            "{0}:1 input_ids[1]: got 10, expected a token id from 0 to 9",
        ),
        (
            [{"input_ids": [-1, 1]}],
            {},
            "{0}:1 input_ids[0]: got -1, expected a token id from 0 to 9",
        ),
        (
            [{"input_ids": [1, 1], "labels": [1, 12]}],
            {},
            "{0}:1 labels[1]: got 12, expected a token id from 0 to 9",
        ),
        ([{"q": 1}], {}, "{0}:1: got the keys q, expected those of a known format"),
    ],
)
def test_what_cannot_be_trained_is_refused(tmp_path, load_rows, rows, section, message):
    with pytest.raises(ConfigError) as caught:
        load_rows(rows, vocab_size=10, **section)
    assert str(caught.value).startswith(message.format(tmp_path / "rows.jsonl"))


def test_text_needs_an_eos(with_template, load_rows):
    with pytest.raises(ConfigError, match="rows.jsonl:1: got text and a tokenizer without EOS"):
        load_rows([{"text": "a"}], with_template(None, eos_token=None, pad_token=None))


def test_several_wrong_rows_come_in_one_message(tmp_path, load_rows):
    rows = [{"input_ids": [1, 2]}, {"input_ids": []}, {"input_ids": ["x"]}, [1]]
    with pytest.raises(ConfigError) as caught:
        load_rows(rows)
    origins = [line.split(" ")[0].rsplit(":", 1) for line in str(caught.value).splitlines()]
    assert [number.rstrip(":") for _, number in origins if number] == ["2", "3"]
    assert f"{tmp_path}/rows.jsonl:4: got a list" in str(caught.value)


def test_of_many_wrong_rows_eight_are_shown_and_all_counted(load_rows):
    with pytest.raises(ConfigError) as caught:
        load_rows([{"input_ids": []}] * 20)
    *shown, count = str(caught.value).splitlines()
    assert len(shown) == 8
    assert count == "data.train: got 20 such rows of 20, expected none; the first 8 are above"


def test_evaluation_names_its_own_field(tmp_path):
    section = DataSection(train=["x"], eval=[str(tmp_path / "none.jsonl")])
    assert section.eval
    with pytest.raises(ConfigError, match=r"data.eval\[0\]: got .*none.jsonl, expected a file"):
        load_examples(section.eval, section, None, name="data.eval")


def test_nothing_is_left_in_the_users_folder(tmp_path, load_rows):
    load_rows([{"input_ids": [1, 2]}])
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_examples_are_read_back_as_written(load_rows):
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 99, size).tolist() for size in rng.integers(1, 9, 50)]
    examples = load_rows([{"input_ids": row} for row in rows])
    order = rng.permutation(50).tolist()
    assert [examples[i].input_ids.tolist() for i in order] == [rows[i] for i in order]


def test_eos_stands_once_after_plain_text_and_texts_that_hold_it_are_counted(
    with_template, load_rows
):
    tokenizer = with_template(None)
    eos = tokenizer.eos_token
    rows = [
        {"prompt": f"a{eos}", "completion": f"b {eos}"},
        {"prompt": "a", "completion": f"b{eos}\n"},
        {"text": f"a b{eos}"},
        {"text": eos},
        {"text": f"a{eos}b"},
    ]
    examples = load_rows(rows, tokenizer)
    assert [decode_sample(examples[index], tokenizer) for index in range(5)] == [
        f"a{eos}⟦b {eos}⟧",
        f"a⟦b{eos}⟧",
        f"a⟦ b{eos}⟧",
        f"{eos}",
        f"a⟦{eos}b{eos}⟧",
    ]
    assert "data.train: 1 texts hold EOS before their end" in examples.report.lines()


def test_a_completion_that_goes_on_after_eos_is_refused(with_template, load_rows):
    tokenizer = with_template(None)
    with pytest.raises(ConfigError, match=r"rows.jsonl:1 completion: got text with <"):
        load_rows([{"prompt": "a", "completion": f"b{tokenizer.eos_token}c"}], tokenizer)


def test_keys_that_are_not_read_are_reported(tokenizers, load_rows):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [{"messages": turns, "id": 1, "source": "x"}, {"messages": turns, "id": 2, "note": None}]
    assert load_rows(rows, tokenizers["v3"]).report.lines()[-1] == (
        "data.train: keys that are not read: id (2 rows), source (1 rows)"
    )


@pytest.mark.parametrize(
    ("closing", "said"),
    [
        ("<|EOT|>\\n", "the chat template ends turns with <|EOT|> (token 259), not with EOS"),
        ("[/A]", "the chat template ends turns with '[/A]', which is no token"),
        ("{{ eos_token }}", None),
        ("", None),
    ],
)
def test_turns_that_do_not_end_with_eos_are_told(with_template, load_rows, closing, said):
    tokenizer = with_template(
        "{% for m in messages %}[{{ m.content }}" + closing.replace("\\n", "\n") + "{% endfor %}"
        "{% if add_generation_prompt %}[{% endif %}"
    )
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    line = load_rows([{"messages": turns}], tokenizer).report.lines()[-1]
    assert line.startswith(f"data.train: {said}") == (said is not None)


def test_rows_from_parquet_train_as_the_same_rows_from_json_lines(tmp_path, tokenizers):
    """Their arguments differ in keys, which Arrow fills up with nulls."""
    rows = [
        {
            "messages": [
                {"role": "user", "content": "go"},
                {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": a}]},
            ]
        }
        for a in ({"city": "Ulm"}, {"zone": {"name": "CET"}}, {"zone": {"at": 1.5}})
    ]
    table, lines = tmp_path / "rows.parquet", tmp_path / "rows.jsonl"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), table)
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    section = DataSection(train=[str(table), str(lines)])
    first, second = (load_examples([file], section, tokenizers["qwen"]) for file in section.train)
    assert first.fingerprint == second.fingerprint


@pytest.mark.parametrize("label", [0, 1, "positive", 0.5])
@pytest.mark.parametrize(
    ("form", "row"),
    [("text", {"text": "a b"}), ("prompt_completion", {"prompt": "a", "completion": "b"})],
)
def test_a_label_is_not_read_where_the_format_is_named(load_rows, tokenizers, form, row, label):
    rows = [row, {**row, "label": label}]
    examples = load_rows(rows, tokenizers["v3"], format=form)
    assert examples[0].input_ids.tolist() == examples[1].input_ids.tolist()
    assert "data.train: keys that are not read: label (1 rows)" in examples.report.lines()
    with pytest.raises(ConfigError, match="set data.format to text or prompt_completion"):
        load_rows(rows, tokenizers["v3"])


@pytest.mark.parametrize("key", ["chosen", "rejected", "images", "weight", "completion_mask"])
def test_other_keys_of_another_meaning_are_refused_in_every_format(load_rows, tokenizers, key):
    with pytest.raises(ConfigError, match=f"rows.jsonl:1 {key}: got {key}, expected a row without"):
        load_rows([{"text": "a", key: [1]}], tokenizers["v3"], format="text")


@pytest.mark.parametrize("label", [True, False, "False"])
@pytest.mark.parametrize("form", ["auto", "prompt_completion"])
def test_a_judgement_of_a_completion_is_refused_also_where_the_format_is_named(
    load_rows, tokenizers, label, form
):
    row = {"prompt": "a", "completion": "b", "label": label}
    with pytest.raises(ConfigError, match="rows.jsonl:1 label: got .*; whether a completion"):
        load_rows([row], tokenizers["v3"], format=form)


def test_a_label_beside_a_conversation_is_refused_in_every_format(load_rows, tokenizers):
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    with pytest.raises(ConfigError, match="rows.jsonl:1 label: got label"):
        load_rows([row | {"label": True}], tokenizers["v3"], format="messages")


def test_other_rows_of_the_same_crc32_have_another_fingerprint():
    drawn = np.random.default_rng(0).integers(0, 2**31, (200_000, 2), dtype=np.int32)
    weights, seen = np.ones(2, np.float32), {}
    for ids in drawn:
        sum_of = zlib.crc32(ids.tobytes() * 2 + weights.tobytes())
        if sum_of in seen:
            break
        seen[sum_of] = ids
    stores = []
    for tokens in (seen[sum_of], ids):
        stores.append(ExampleStore())
        stores[-1].append(Example(tokens, tokens, weights))
        stores[-1].finalize()
    assert seen[sum_of].tolist() != ids.tolist()
    assert stores[0].fingerprint != stores[1].fingerprint


def test_a_fingerprint_tells_where_examples_end():
    def store(*lengths: int) -> ExampleStore:
        made = ExampleStore()
        for length in lengths:
            made.append(Example(*np.zeros((2, length), np.int32), np.zeros(length, np.float32)))
        made.finalize()
        return made

    assert store(1, 2).fingerprint == store(1, 2).fingerprint != store(2, 1).fingerprint
