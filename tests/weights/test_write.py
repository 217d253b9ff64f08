# SPDX-License-Identifier: Apache-2.0
"""What is written is read again; what is under way at a time is bounded; what fails says where."""

import os
import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tiny

from dsjax.distributed import arrays
from dsjax.errors import ConfigError
from dsjax.models.changes import Change
from dsjax.weights import write
from dsjax.weights.drafts import file_digests
from dsjax.weights.hf_directory import HFSource, open_source

PIECE = 4096
CHANGED = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers in several files."""
    folder = tmp_path_factory.mktemp("model")
    return tiny.build_checkpoint(folder, "llama_gqa", num_hidden_layers=2)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """An empty folder."""
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


def _plus_one(rows: tuple[slice, ...]) -> np.ndarray:
    return np.ones(1, np.float32)


CHANGES = {CHANGED: Change(_plus_one, lambda source, part: source.astype(np.float32) + part)}


def test_files_are_the_same_in_pieces_and_their_digests_are_told(
    checkpoint: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arrays, "PIECE_BYTES", PIECE)
    source, told = open_source(checkpoint), []
    digests = write.write_checkpoint(source, out, CHANGES, lambda *at: told.append(at))
    assert digests == {name: file_digests(out)[name] for name in source.files}
    assert told[-1][0] == told[-1][1] == sum(info.nbytes for info in source.tensors.values())
    written = open_source(out)
    for name in source.tensors:
        expected = source.read(name) + (name == CHANGED)
        assert written.read(name).tobytes() == expected.astype(written.read(name).dtype).tobytes()


def test_known_digests_are_not_computed_again(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a")
    (tmp_path / "b").write_text("b")
    plain = file_digests(tmp_path)
    assert file_digests(tmp_path, {"a": "known", "gone": "x"}) == plain | {"a": "known"}


def test_the_pieces_under_way_are_bounded(
    checkpoint: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arrays, "PIECE_BYTES", PIECE)
    started, most, read = 0, 0, HFSource.read

    def counted(source: HFSource, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        nonlocal started
        values = read(source, name, index)
        started += values.nbytes
        return values

    def progress(done: int, total: int) -> None:
        nonlocal most
        most = max(most, started - done)

    monkeypatch.setattr(HFSource, "read", counted)
    source = open_source(checkpoint)
    write.write_checkpoint(source, out, CHANGES, progress)
    assert 0 < most <= (2 * write.PIECES + 1) * PIECE


def _flip(folder: Path, name: str) -> str:
    """Change a bit of a tensor's last byte."""
    info = open_source(folder).tensors[name]
    with (folder / info.file).open("r+b") as file:
        file.seek(info.end - 1)
        byte = file.read(1)[0]
        file.seek(info.end - 1)
        file.write(bytes([byte ^ 1]))
    return str(folder)


@pytest.mark.parametrize("name", ["lm_head.weight", CHANGED, "model.norm.weight"])
def test_a_bit_that_the_disk_changed_is_found(checkpoint: Path, out: Path, name: str) -> None:
    file = open_source(checkpoint).tensors[name].file
    said = re.escape(f"{out}: what was read back differs from what was written: ['{file}']")
    with pytest.raises(RuntimeError, match=said):
        write.write_checkpoint(
            open_source(checkpoint), out, CHANGES, share=partial(_flip, out, name)
        )


@contextmanager
def _no_file_above(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_told_of_the_file_that_a_thread_was_writing(
    checkpoint: Path, out: Path
) -> None:
    source = open_source(checkpoint)
    with (
        pytest.raises(ConfigError, match=re.escape(str(out / source.files[0]))),
        _no_file_above(8192),
    ):
        write.write_checkpoint(source, out, CHANGES)


def test_a_file_that_ends_while_threads_read_it_is_named(
    checkpoint: Path, out: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "short"
    folder.mkdir()
    write.write_checkpoint(open_source(checkpoint), folder, {})
    source = open_source(folder)
    file = folder / source.files[-1]
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(OSError, match=re.escape(f"{file} ended at byte")):
        write.write_checkpoint(source, out, {})
    with pytest.raises(ConfigError, match="it is truncated"):
        open_source(folder)
