# SPDX-License-Identifier: Apache-2.0
"""What is compiled once is kept in the user's cache, unless jax was told another thing."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

from dsjax.distributed.compilation_cache import MAX_BYTES, keep_compiled

NAMES = (
    "jax_compilation_cache_dir",
    "jax_compilation_cache_max_size",
    "jax_enable_compilation_cache",
)
SETTINGS: Any = jax.config


@pytest.fixture(autouse=True)
def as_users_have_it() -> Iterator[None]:
    """jax as it is where no variable is set; the tests' own cache comes back afterwards."""
    ours = {name: getattr(SETTINGS, name) for name in NAMES}
    SETTINGS.update("jax_compilation_cache_dir", None)
    yield
    for name, value in ours.items():
        SETTINGS.update(name, value)


def test_programs_are_kept_in_the_cache_home(tmp_path: Path):
    kept = keep_compiled({"XDG_CACHE_HOME": str(tmp_path)})
    assert kept == SETTINGS.jax_compilation_cache_dir == f"{tmp_path}/dsjax/compiled"
    assert (tmp_path / "dsjax" / "compiled").is_dir()
    assert SETTINGS.jax_compilation_cache_max_size == MAX_BYTES


def test_a_folder_that_the_user_names_is_left_as_it_is(tmp_path: Path):
    SETTINGS.update("jax_compilation_cache_dir", "gs://bucket/compiled")
    assert keep_compiled({"XDG_CACHE_HOME": str(tmp_path)}) == "gs://bucket/compiled"
    assert SETTINGS.jax_compilation_cache_max_size == -1 and not list(tmp_path.iterdir())


def test_whoever_wants_none_has_none(tmp_path: Path):
    SETTINGS.update("jax_enable_compilation_cache", False)
    assert keep_compiled({"XDG_CACHE_HOME": str(tmp_path)}) is None
    assert SETTINGS.jax_compilation_cache_dir is None and not list(tmp_path.iterdir())


def test_where_no_folder_can_be_made_nothing_is_kept(tmp_path: Path):
    (tmp_path / "dsjax").write_text("a file")
    assert keep_compiled({"XDG_CACHE_HOME": str(tmp_path)}) is None
    assert SETTINGS.jax_compilation_cache_dir is None


def test_whoever_has_no_home_keeps_nothing(monkeypatch: pytest.MonkeyPatch):
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    assert keep_compiled({}) is None


def test_what_a_killed_process_was_writing_is_removed(tmp_path: Path):
    folder = tmp_path / "dsjax" / "compiled"
    folder.mkdir(parents=True)
    for name in ("whole-cache", "whole-atime", "torn-cache"):
        (folder / name).write_bytes(b"12345678")
    keep_compiled({"XDG_CACHE_HOME": str(tmp_path)})
    assert sorted(path.name for path in folder.iterdir()) == ["whole-atime", "whole-cache"]
