# SPDX-License-Identifier: Apache-2.0
"""Loading tokenizers as checkpoints ship them, and plain text with BOS exactly once."""

import json
from datetime import datetime

import pytest
from tokenizers import Tokenizer, pre_tokenizers, processors

from dsjax.data import encode_text, find_tokenizer, load_tokenizer
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
