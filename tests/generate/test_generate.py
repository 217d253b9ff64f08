# SPDX-License-Identifier: Apache-2.0
"""The command: plain and chat prompts, stop tokens and texts, streaming, refusals."""

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny

import dsjax
from dsjax.data import encode_chat, encode_text, load_tokenizer
from dsjax.decoding import decode
from dsjax.decoding.detokenizer import TextBatch, TextStream
from dsjax.errors import ConfigError
from dsjax.generate import command
from dsjax.models import Model

Run = Callable[..., tuple[str, str]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build_checkpoint(tmp_path_factory.mktemp("model"), "llama_gqa")


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Model:
    return dsjax.load_pretrained(str(checkpoint), dtype="float32")


@pytest.fixture
def run(checkpoint: Path, model: Model, capsys, monkeypatch) -> Run:
    """Run the command on a model that is loaded already; returns stdout and stderr."""
    monkeypatch.setattr(command, "load_pretrained", lambda *_: model)

    def call(*words: str) -> tuple[str, str]:
        assert command.main(["--model", str(checkpoint), "--max-new-tokens", "10", *words]) == 0
        return capsys.readouterr()

    return call


def text_after(model: Model, checkpoint: Path, prompt: list[int]) -> str:
    """What the library gives for a prompt, as text."""
    rows = decode.generate(model, [prompt], max_new_tokens=10, stop_ids=[1])
    return str(load_tokenizer(checkpoint).decode(rows[0], skip_special_tokens=True))


def test_the_command_as_a_user_runs_it(checkpoint: Path, model: Model, run_cli):
    words = ("--dtype", "float32", "--max-new-tokens", 10, "--prompt", "the question")
    done = run_cli("generate", "--model", checkpoint, *words)
    assert done.returncode == 0, done.stderr
    prompt = encode_text(load_tokenizer(checkpoint), "the question")
    assert done.stdout == text_after(model, checkpoint, prompt) + "\n"
    assert "cut at 10 new tokens" in done.stderr


def test_prompts_are_answered_one_after_another(run: Run, model: Model, checkpoint: Path):
    tokenizer = load_tokenizer(checkpoint)
    texts = ["the question", "an", "the other answer and more"]
    out, err = run(*(word for text in texts for word in ("--prompt", text)))
    answers = [text_after(model, checkpoint, encode_text(tokenizer, text)) for text in texts]
    assert out == "".join(answer + "\n" for answer in answers)
    assert [line for line in err.splitlines() if line[0] == "["] == [
        f"[{number}] {text}" for number, text in enumerate(texts, 1)
    ]


def test_a_chat_prompt_goes_through_the_template(run: Run, model: Model, checkpoint: Path):
    messages = [{"role": "user", "content": "the question"}]
    prompt = encode_chat(load_tokenizer(checkpoint), messages)
    assert (
        run("--chat", "--prompt", "the question")[0] == text_after(model, checkpoint, prompt) + "\n"
    )


def test_a_conversation_remembers(run: Run, model: Model, checkpoint: Path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("first\n\nsecond\n/exit\nthird\n"))
    out, _ = run("--chat")

    tokenizer, messages, answers = load_tokenizer(checkpoint), [], []
    for line in ("first", "second"):
        messages.append({"role": "user", "content": line})
        answers.append(text_after(model, checkpoint, encode_chat(tokenizer, messages)))
        messages.append({"role": "assistant", "content": answers[-1]})
    assert out == "".join(answer + "\n" for answer in answers)


def test_a_conversation_ends_with_the_input(run: Run, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("first"))
    assert run("--chat")[0].endswith("\n")
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert run("--chat")[0] == ""


def test_a_stop_text_ends_the_answer(run: Run):
    whole = run("--prompt", "the question")[0].rstrip("\n")
    stop = next(mark for mark in whole[1:] if mark != "\ufffd")
    out, err = run("--prompt", "the question", "--stop", stop, "--stop", "not in there")
    assert out == whole[: whole.index(stop)] + "\n"
    assert "cut at" not in err


def test_drawn_answers_can_be_had_again(run: Run):
    words = ("--prompt", "an", "--temperature", "1.5", "--top-k", "50", "--top-p", "0.99")
    first = run(*words, "--seed", "1")[0]
    assert run(*words, "--seed", "1")[0] == first
    assert run(*words, "--seed", "2")[0] != first


def test_passing_the_models_positions_is_said(run: Run):
    _, err = run("--prompt", "zq" * 124)
    assert "new ones pass the model's max_position_embeddings (256)" in err


class Letters(TextStream):
    """A text stream whose tokens are letters, with `.` as the stop text."""

    def __init__(self) -> None:
        self.stopped = False

    def push(self, token: int) -> str:
        self.stopped = chr(token) == "."
        return "" if self.stopped else chr(token)

    def finish(self) -> str:
        return ""


def test_the_first_row_is_printed_as_it_comes_and_others_wait(capsys):
    batch = TextBatch([Letters(), Letters()], {0})
    answers = command.StreamPrinter(batch, ["one", "two"])
    said = []
    for row, token in [(0, ord("a")), (1, ord("x")), (0, ord("b")), (1, ord("y")), (0, 0)]:
        assert not answers.take(row, token)
        said.append(capsys.readouterr())
    assert [part.out for part in said] == ["a", "", "b", "", "\nxy"]
    assert [part.err for part in said] == ["[1] one\n", "", "", "", "[2] two\n"]
    assert answers.take(1, ord("."))
    assert capsys.readouterr().out == "\n"
    assert answers.close() == []
    assert batch.texts == ["ab", "xy"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "--prompt: got none, expected at least one --prompt TEXT, or --chat"),
        (["--prompt", "a", "--top-p", "1.5", "--temperature", "1"], "--top-p: got 1.5"),
        (["--prompt", "a", "--top-k", "5"], "--temperature: got 0 (greedy) with --top-k, expected"),
        (["--prompt", "a", "--max-new-tokens", "0"], "--max-new-tokens: got 0, expected"),
        (["--prompt", "a", "--seed", "-1"], "--seed: got -1, expected"),
        (["--prompt", "a", "--stop", ""], "--stop: got an empty text"),
        (["--prompt", "\udcff"], "--prompt: got '\\udcff', expected text in UTF-8"),
        (["--prompt", "a", "--adapter", "/nowhere"], "--adapter: got '/nowhere', expected"),
    ],
)
def test_refusals(checkpoint: Path, words: list[str], says: str):
    with pytest.raises(ConfigError) as error:
        command.main(["--model", str(checkpoint), *words])
    assert says in str(error.value)


def test_checkpoints_that_cannot_answer(tmp_path: Path):
    with pytest.raises(ConfigError, match="--model: got '/nowhere', expected a directory"):
        command.main(["--model", "/nowhere", "--prompt", "a"])
    (tmp_path / "config.json").write_text('{"model_type": "llama", "vocab_size": 20}')
    with pytest.raises(ConfigError, match="--model: got .* without tokenizer.json"):
        command.main(["--model", str(tmp_path), "--prompt", "a"])
    tiny.write_tokenizer(tmp_path)
    with pytest.raises(ConfigError, match="prompt 1: got token .*, expected ids from 0 to 19"):
        command.main(["--model", str(tmp_path), "--prompt", "zzz"])
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match="got a conversation and a tokenizer without chat templ"):
        command.main(["--model", str(tmp_path), "--chat"])


def test_an_unknown_option():
    with pytest.raises(ConfigError, match=r"--topp: got an option .* --top-p"):
        command.main(["--model", "m", "--prompt", "a", "--topp", "1"])


def test_an_interrupt_ends_quietly(monkeypatch, capsys):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "run", interrupted)
    assert command.main(["--model", "m", "--prompt", "a"]) == 130
    assert capsys.readouterr().out == ""
