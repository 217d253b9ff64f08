# SPDX-License-Identifier: Apache-2.0
"""Loading tokenizers as checkpoints ship them, and plain text with BOS exactly once."""

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from spoilt import spoilt
from tokenizers import Tokenizer, pre_tokenizers, processors

from dsjax.data import encode_chat, encode_text, find_tokenizer, load_tokenizer
from dsjax.errors import ConfigError

TEMPLATE = "{% for m in messages %}[{{ m.content }}]{% endfor %}"


def test_spaces_survive_the_class_that_the_file_names(tokenizer_folder):
    folder = tokenizer_folder(None)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "LlamaTokenizerFast"
    tokenizer = load_tokenizer(folder)
    assert tokenizer.decode(encode_text(tokenizer, "a  b c", add_bos=False)) == "a  b c"


@pytest.mark.parametrize(("flag", "count"), [(True, 1), (False, 0), (None, 0)])
def test_bos_before_text_follows_the_flag(tokenizer_folder, flag, count):
    tokenizer = load_tokenizer(tokenizer_folder(None, add_bos_token=flag))
    bos = tokenizer.bos_token_id
    assert encode_text(tokenizer, "a").count(bos) == count
    assert encode_text(tokenizer, f"{tokenizer.bos_token}a").count(bos) == 1
    assert encode_text(tokenizer, "a", add_bos=False).count(bos) == 0
    assert tokenizer("a").input_ids.count(bos) == count


def test_without_flag_the_post_processor_decides(tokenizer_folder):
    folder = tokenizer_folder(None)
    inner = Tokenizer.from_file(str(folder / "tokenizer.json"))
    bos = "<｜begin▁of▁sentence｜>"
    inner.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, inner.token_to_id(bos))]
    )
    inner.enable_truncation(2)
    inner.save(str(folder / "tokenizer.json"))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.add_bos_token
    assert len(encode_text(tokenizer, "abc")) == 4


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("chat_template.jinja", TEMPLATE),
        ("assets/chat_template.jinja", TEMPLATE),
        ("chat_template.json", json.dumps({"chat_template": TEMPLATE})),
    ],
)
def test_chat_templates_are_found_beside_the_config(tokenizer_folder, name, content):
    folder = tokenizer_folder(None)
    assert load_tokenizer(folder).chat_template is None
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(content)
    assert load_tokenizer(folder).chat_template == TEMPLATE


def test_a_folder_without_tokenizer_is_refused(tmp_path):
    with pytest.raises(ConfigError) as caught:
        load_tokenizer(tmp_path)
    assert str(caught.value).startswith(
        f"model.path: got {tmp_path} without tokenizer.json, expect"
    )


def test_a_damaged_tokenizer_is_refused(tokenizer_folder):
    folder = tokenizer_folder(None)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="model.path: got tokenizer files in .* cannot be read"):
        load_tokenizer(folder)


def test_a_tokenizer_that_loses_spaces_is_refused(tokenizer_folder):
    folder = tokenizer_folder(None)
    inner = Tokenizer.from_file(str(folder / "tokenizer.json"))
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    inner.save(str(folder / "tokenizer.json"))
    with pytest.raises(ConfigError, match="turns 'hello world, one two' into 'helloworld,onetwo'"):
        load_tokenizer(folder)


def test_code_in_the_folder_is_not_run(tokenizer_folder):
    folder = tokenizer_folder(None, auto_map={"AutoTokenizer": ["evil.Tokenizer", None]})
    (folder / "evil.py").write_text("raise SystemExit('executed')")
    assert load_tokenizer(folder)


@pytest.mark.parametrize(
    "call",
    ['strftime_now("%d %b %Y")', "strftime_now( '%d %b %Y' )", 'strftime_now(format="%d %b %Y")'],
)
def test_a_template_s_date_is_the_run_s(tokenizer_folder, call):
    """Tomorrow's prompts would be other tokens than those that the run began with."""
    template = "{%- if strftime_now is defined %}Today: {{ " + call + " }}{% endif %}" + TEMPLATE
    tokenizer = find_tokenizer(tokenizer_folder(template), "messages", datetime(2024, 7, 26, 23))
    text = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    assert text == "Today: 26 Jul 2024[a]"


SMALL_FILES = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.json")


@pytest.mark.parametrize("name", [*SMALL_FILES, "added_tokens.json", "tokenizer.json"])
@pytest.mark.parametrize("content", ["[]", "null", "7", '"x"', "{", "[" * 90_000])
def test_another_value_is_no_file_of_a_tokenizer(tokenizer_folder, name, content):
    folder = tokenizer_folder(TEMPLATE)
    (folder / name).write_text(content)
    with pytest.raises(ConfigError, match="model.path: got") as caught:
        load_tokenizer(folder)
    assert str(folder) in str(caught.value) and len(str(caught.value)) < 1_000


@pytest.mark.parametrize("name", ["tokenizer_config.json", "chat_template.json"])
@pytest.mark.parametrize("template", [7, True, {"default": None}, ["x"]])
def test_a_chat_template_is_text(tokenizer_folder, name, template):
    folder = tokenizer_folder(None)
    held = json.loads((folder / name).read_text()) if (folder / name).is_file() else {}
    (folder / name).write_text(json.dumps({**held, "chat_template": template}))
    with pytest.raises(ConfigError, match=r"model\.path: got .*, expected"):
        load_tokenizer(folder)


def test_a_chat_template_that_is_no_text_at_all(tokenizer_folder):
    folder = tokenizer_folder(None)
    (folder / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"model\.path: got .* cannot be read \(UnicodeDecodeErr"):
        load_tokenizer(folder)


@pytest.mark.parametrize("flag", ["false", 0, [False]])
def test_whether_text_begins_with_bos_is_a_flag(tokenizer_folder, flag):
    folder = tokenizer_folder(None, add_bos_token=flag)
    with pytest.raises(ConfigError, match=r"add_bos_token in .*, expected true, false or null"):
        load_tokenizer(folder)


def _tokenizer_files(folder: Path) -> dict[str, Any]:
    """The content of each file, all of those that are there in one form or another."""
    files = {name: json.loads((folder / name).read_text()) for name in ("tokenizer.json",)}
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    files["tokenizer_config.json"] = settings | {"add_bos_token": True, "chat_template": TEMPLATE}
    files["special_tokens_map.json"] = {"bos_token": settings["bos_token"], "pad_token": "x"}
    files["chat_template.json"] = {"chat_template": TEMPLATE}
    return files


def _is_loaded_or_refused(folder: Path, name: str, content: bytes) -> None:
    before = (folder / name).read_bytes() if (folder / name).is_file() else None
    (folder / name).write_bytes(content)
    try:
        tokenizer = load_tokenizer(folder)
        if tokenizer.chat_template:
            encode_chat(tokenizer, [{"role": "user", "content": "a b"}])
        encode_text(tokenizer, "a b")
    except ConfigError as error:
        assert len(str(error)) < 1_000
    finally:
        (folder / name).unlink()
        if before is not None:
            (folder / name).write_bytes(before)


def _spoil_files(folder: Path, examples: int) -> None:
    files = _tokenizer_files(folder)
    damaged = st.sampled_from(sorted(files)).flatmap(
        lambda name: st.tuples(st.just(name), spoilt(files[name]))
    )

    @settings(max_examples=examples, suppress_health_check=[HealthCheck.too_slow])
    @given(damaged)
    def load(file: tuple[str, bytes]) -> None:
        _is_loaded_or_refused(folder, *file)

    load()


def test_damaged_files_are_read_or_refused(tokenizer_folder):
    _spoil_files(tokenizer_folder(None), 25)


@pytest.mark.slow
def test_many_damaged_files_are_read_or_refused(tokenizer_folder):
    _spoil_files(tokenizer_folder(None), 400)
