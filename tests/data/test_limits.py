# SPDX-License-Identifier: Apache-2.0
"""Chat templates without an end are ended, with the row and the template named; others are not."""

import resource
import signal
import threading
import time

import pytest

from dsjax.data import encode_chat, limits
from dsjax.data.limits import LimitError, limited
from dsjax.errors import ConfigError

ROW = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
MACRO = "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(70) }}"
DOUBLED = "{% set ns = namespace(x='x') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}"
SLOW = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "texts": "{% set s = 'x' * 99999 %}{% for i in s %}{% for j in s %}{% endfor %}{% endfor %}",
    "macro": MACRO,
}
LARGE = {
    "product": "{{ 'x' * 10**12 }}",
    "power": "{{ ['x'] * 10**9 }}",
    "doubled": DOUBLED + "{% endfor %}",
    "output": "{% for i in range(99999) %}{% for j in range(99999) %}{{ m }}{{ 'y' * 99999 }}"
    "{% endfor %}{% endfor %}",
    "width": "{{ '%999999999999d' % 1 }}",
}


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch):
    """Limits that are reached soon."""
    monkeypatch.setattr(limits, "LIMIT_S", 0.3)
    monkeypatch.setattr(limits, "MOST_BYTES", 2**28)


@pytest.fixture(autouse=True)
def unchanged():
    """A limit goes with its block."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    yield
    assert resource.getrlimit(resource.RLIMIT_AS) == before
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)


@pytest.mark.parametrize("template", [*SLOW.values(), *LARGE.values()], ids=[*SLOW, *LARGE])
def test_a_template_without_an_end_is_ended(short, tmp_path, with_template, load_rows, template):
    tokenizer = with_template(template + "{% for m in messages %}{{ m.content }}{% endfor %}")
    began = time.process_time()
    with pytest.raises(ConfigError) as caught:
        load_rows([ROW] * 20, tokenizer)
    said = str(caught.value)
    assert said.startswith(f"{tmp_path}/rows.jsonl:1: got a conversation that the chat template")
    assert said.endswith(f"correct the template in {tmp_path}/tok")
    assert time.process_time() - began < 20 and len(said) < 600


@pytest.mark.parametrize("template", SLOW.values(), ids=SLOW)
def test_a_slow_template_is_named(short, tmp_path, with_template, load_rows, template):
    with pytest.raises(ConfigError) as caught:
        load_rows([ROW], with_template(template))
    assert str(caught.value) == (
        f"{tmp_path}/rows.jsonl:1: got a conversation that the chat template refuses (it takes "
        f"longer than 0.3 s), expected one that it renders; correct the template in {tmp_path}/tok"
    )


def test_a_text_of_too_many_characters_is_refused(tmp_path, with_template, load_rows):
    tokenizer = with_template("{{ 'x' * 10000001 }}")
    with pytest.raises(ConfigError, match=r"refuses \(it makes 10,000,001 characters of it\)"):
        load_rows([ROW], tokenizer)


def test_a_prompt_is_limited_as_a_row_is(short, with_template):
    with pytest.raises(ConfigError, match=r"messages: got a conversation .* longer than 0.3 s"):
        encode_chat(with_template(SLOW["loops"]), ROW["messages"])


def test_a_block_within_its_limits_is_left_alone():
    with limited():
        assert sum(range(1000)) == 499500
    with pytest.raises(ZeroDivisionError), limited():
        print(1 / 0)


def test_an_end_that_is_taken_for_an_error_comes_again(short):
    with pytest.raises(LimitError, match="longer than"), limited():
        try:
            while True:
                pass
        except LimitError:
            pass
        while True:
            pass


def test_another_thread_has_a_limit_of_memory(short):
    found = []

    def run() -> None:
        try:
            with limited():
                bytearray(2**30)
        except LimitError as error:
            found.append(str(error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == ["MemoryError: it asks for more than 0.25 GiB"]
