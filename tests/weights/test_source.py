# SPDX-License-Identifier: Apache-2.0
"""A checkpoint's digest: of its contents, wherever they lie, and of nothing else."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny

from dsjax.weights import source as sources
from dsjax.weights.convert import to_flax
from dsjax.weights.load import open_checkpoint
from dsjax.weights.safetensors import read_header
from dsjax.weights.source import source_digest


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build_checkpoint(tmp_path_factory.mktemp("source") / "model", "llama_gqa")


def digest_of(folder: Path) -> str:
    return source_digest(open_checkpoint(str(folder)))


def test_a_copy_saved_again_and_its_other_form_have_the_same_digest(
    checkpoint: Path, tmp_path: Path
):
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    config |= {"transformers_version": "9", "_name_or_path": "elsewhere"}
    (copy / "config.json").write_text(json.dumps(config))
    to_flax(str(checkpoint), str(tmp_path / "flax"))
    assert digest_of(copy) == digest_of(checkpoint) == digest_of(tmp_path / "flax")


def test_every_tensor_of_a_small_checkpoint_counts(checkpoint: Path, tmp_path: Path):
    """One bit of one number, in each tensor in turn; and one field of the config."""
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    found = {digest_of(copy)}
    infos = [info for file in copy.glob("*.safetensors") for info in read_header(file)[1]]
    rng = np.random.default_rng(0)
    for info in infos:
        file = copy / info.file
        whole = file.read_bytes()
        changed = bytearray(whole)
        changed[rng.integers(info.start, info.end)] ^= 1
        file.write_bytes(changed)
        found.add(digest_of(copy))
        file.write_bytes(whole)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    found.add(digest_of(copy))
    assert len(found) == len(infos) + 2


def test_large_tensors_are_sampled_and_few_of_many(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
):
    read: list[int] = []
    source = open_checkpoint(str(checkpoint))
    plain = type(source).read

    def spy(self, name, index=None):
        part = plain(self, name, index)
        read.append(part.nbytes)
        return part

    monkeypatch.setattr(type(source), "read", spy)
    monkeypatch.setattr(sources, "MOST_SAMPLES", 5)
    monkeypatch.setattr(sources, "SAMPLE_BYTES", 1 << 9)
    source_digest(source)
    assert len(read) == 5 and max(read) <= 1 << 9
