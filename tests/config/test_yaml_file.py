# SPDX-License-Identifier: Apache-2.0
"""YAML files and the words of a command line: read whole, or refused with their name."""

from pathlib import Path

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dsjax.config import RunConfig, load_config, rules, split_arguments, to_yaml
from dsjax.config.yaml_file import parse_yaml, read_yaml, set_overrides, to_text
from dsjax.errors import ConfigError

SMALLEST = {"model": {"path": "m"}, "data": {"train": "rows.jsonl"}, "output_dir": "run"}
KEYS = rules.keys(RunConfig)


def _set(text: str) -> object:
    """What an override makes of a text."""
    return set_overrides(SMALLEST, [f"output_dir={text}"], KEYS)["output_dir"]


@pytest.mark.parametrize(
    "text",
    [
        *("exp #2", "exp#2", "exp\t#2", "5 # five", "# exp", "exp ", " exp", "\texp\t", " "),
        *("a: b", "a:", "- a", "? a", "&a exp", "*a", "!exp", "!!str exp", "%exp", "@exp", "`e`"),
        *("--- exp", "---", "exp\n---\nb", "exp\n...\nb", "...", "|", ">", "| exp", "a\n\nb"),
        *(
            "\ufeffexp",
            "a\x85b",
            "a\u2028b",
            "a\\ b",
            "a, b]",
            "b}",
            "it's",
            'a "b"',
            "016",
            "1:30",
        ),
        *("016", "1:30", "1 000", " 5", "5 ", "null ", "C:\\runs", "exp=2", "=exp", "经验 #2"),
    ],
)
def test_a_text_is_its_whole_word(text: str):
    assert _set(text) == text


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("5", 5), ("1e-4", 1e-4), ("true", True), ("null", None), ("", None)),
        *(("[a, b c]", ["a", "b c"]), ("{a: 1}", {"a": 1}), ("[a,\n  b]", ["a", "b"])),
        *(('"exp #2"', "exp #2"), ("'it''s'", "it's"), ('"5"', "5"), ("[a] ", ["a"]), ("''", "")),
    ],
)
def test_yaml_of_one_value_is_read_as_such(text: str, value: object):
    assert _set(text) == value


@pytest.mark.parametrize(
    "text",
    [
        *("[a] # b", "'a' #b", "[a #2, b]", "[a\n# b\n]", '"a"\n# b', "{a: 1} # b", "[a] b"),
        *("'it", '"a" b', "[a", "{a", "'a'\n---\nb", '"a"\n...\nb', "[" * 5_000, "9" * 5_000),
        *("\ud800", "\x07", "=", "<<", "[&a [*a]]", "2026-13-45"),
    ],
)
def test_what_would_be_cut_is_refused(text: str):
    with pytest.raises(ConfigError, match="^output_dir: got ") as refused:
        _set(text)
    assert """quote text: output_dir='"..."'""" in str(refused.value)


PIECES = st.sampled_from([*"#\n\t !|>", " #", ": ", "&a ", "*a", "---", "- "])
WORDS = st.lists(PIECES | st.text(max_size=5), max_size=6).map("".join)


def _is_whole_or_refused(folder: Path, text: str) -> None:
    file = folder / "run.yaml"
    file.write_text(to_text(SMALLEST), "utf-8")
    try:
        config = load_config(file, [f"data.split={text}", f"data.train={text}"])
    except ConfigError as error:
        assert "data." in str(error)
        return
    if text[:1] in ("[", "{", "'", '"'):
        assert config.data.split == yaml.safe_load(text)
    elif text.lower() in ("", "~", "null"):
        assert config.data.split is None
    else:
        assert (config.data.split, config.data.train) == (text, [text])
    file.write_text(to_yaml(config), "utf-8")
    assert load_config(file) == config


_words = given(WORDS)


@settings(max_examples=40)
@_words
@example("a\x85 b")
def test_a_word_is_whole_or_refused(tmp_path_factory, text: str):
    _is_whole_or_refused(tmp_path_factory.getbasetemp(), text)


@pytest.mark.slow
@settings(max_examples=300)
@_words
def test_many_words_are_whole_or_refused(tmp_path_factory, text: str):
    _is_whole_or_refused(tmp_path_factory.getbasetemp(), text)


# ---- Files that are more than they seem

LAUGHS = "a0: &a0 [x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LAUGHS, "run.yaml:6: got more than 100000 values, aliases written out, expected valid"),
        ("a: &a\n  b: [*a]\n", "run.yaml:2: got the alias *a inside what it stands for"),
        ("a: &a {<<: *a}\n", "run.yaml:1: got the alias *a inside what it stands for"),
        ("a: " + "[" * 3_000, "run.yaml: got lists or mappings nested too deeply"),
        ("".join(" " * i + "a:\n" for i in range(2_000)), "run.yaml: got lists or mappings nested"),
        ("a: " + "9" * 5_000, "run.yaml: got Exceeds the limit (4300 digits)"),
        ("a: 2026-13-45", "run.yaml: got month must be in 1..12"),
    ],
    ids=["laughs", "itself", "merged", "lists", "mappings", "integer", "date"],
)
def test_a_file_that_would_not_end_is_refused(tmp_path: Path, text: str, message: str):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as refused:
        read_yaml(file)
    assert message in str(refused.value)


def test_aliases_and_merges_are_read():
    text = "a: &a {b: 1}\nc: {<<: *a, d: [*a, *a]}"
    assert parse_yaml(text, "") == {"a": {"b": 1}, "c": {"b": 1, "d": [{"b": 1}] * 2}}


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.dates() | st.text(max_size=5)
SCALARS |= st.sampled_from([10**400, -(2**63), "1e999", "all-linear", "(", b"x"])
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)
PLACES = st.sampled_from([(section, key) for section, keys in KEYS.items() for key in keys or [""]])
ODD_KEYS = st.none() | st.integers() | st.booleans() | st.dates() | st.text(max_size=4)


def _is_read_or_refused(
    folder: Path, changes: list[tuple[tuple[str, str], object]], odd: object, inside: bool
) -> None:
    tree = {name: dict(v) if isinstance(v, dict) else v for name, v in SMALLEST.items()}
    for (section, key), value in changes:
        if key:
            tree[section] = {**tree.get(section, {}), key: value}
        else:
            tree[section] = value
    if odd != "":
        (tree["data"] if inside else tree)[odd] = 1
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(tree), "utf-8")
    try:
        config = load_config(file)
    except ConfigError as error:
        assert len(str(error)) < 5_000
        return
    file.write_text(to_yaml(config), "utf-8")
    assert load_config(file) == config


_trees = given(
    st.lists(st.tuples(PLACES, VALUES), max_size=3), st.just("") | ODD_KEYS, st.booleans()
)


@settings(max_examples=60)
@_trees
def test_any_tree_is_a_configuration_or_refused(tmp_path_factory, changes, odd, inside):
    _is_read_or_refused(tmp_path_factory.getbasetemp(), changes, odd, inside)


@pytest.mark.slow
@settings(max_examples=400)
@_trees
def test_any_of_many_trees_is_a_configuration_or_refused(tmp_path_factory, changes, odd, inside):
    _is_read_or_refused(tmp_path_factory.getbasetemp(), changes, odd, inside)


def test_arguments_are_split_wherever_they_stand():
    assert split_arguments([]) == (None, [], frozenset())
    words = ["a.b=1", "--config", "run.yaml", "c.d=-1", "--print-config", "-h"]
    expected = ("run.yaml", ["a.b=1", "c.d=-1"], frozenset({"--print-config", "--help"}))
    assert split_arguments(words) == expected
    for words in (["--config=run.yaml"], ["run.yaml"]):
        assert split_arguments(words) == ("run.yaml", [], frozenset())
    words = ["data.train=rows.yaml", "a b/run.yml", "--schema"]
    assert split_arguments(words) == ("a b/run.yml", words[:1], frozenset({"--schema"}))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lr=1"], "--lr: got an unknown option, expected one of the options, or a setting as "),
        (["--confg=a.yaml"], "--confg: got an unknown option, "),
        (["a.yaml", "b.yml"], "--config: got a.yaml and b.yml, expected one YAML file"),
        (["--config", "a", "b.yaml"], "--config: got a and b.yaml, expected one YAML file"),
        (["--config"], "--config: got no file, expected one YAML file"),
        (["--config="], "--config: got no file, expected one YAML file"),
        (["--config", "a=1.yaml", "--config", "b"], "--config: got a=1.yaml and b, expected one"),
    ],
)
def test_wrong_arguments_are_refused(words: list[str], message: str):
    with pytest.raises(ConfigError) as caught:
        split_arguments(words)
    assert str(caught.value).startswith(message)
