# SPDX-License-Identifier: Apache-2.0
"""A folder is there whole or not at all, whatever happens while it is written."""

import os
import shutil
from pathlib import Path

import pytest

from dsjax.config import ExportSection, load_config
from dsjax.errors import ConfigError
from dsjax.export.folder import check_outputs, check_replaceable
from dsjax.weights.folders import (
    atomic_directory,
    check_empty,
    check_possible,
    check_room,
    leftovers_of,
)


def _files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_a_folder_appears_when_it_is_complete(tmp_path: Path) -> None:
    with atomic_directory(tmp_path / "deep" / "out") as folder:
        (folder / "a").write_text("new")
        assert not (tmp_path / "deep" / "out").exists()
    assert _files(tmp_path) == {"deep", "deep/out", "deep/out/a"}


def test_a_url_is_no_place_to_write() -> None:
    with pytest.raises(ConfigError, match="directory: got 'gs://b/out', expected a folder of a fi"):
        check_empty("gs://b/out", "directory")


def test_an_old_folder_is_replaced_whole(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    with atomic_directory(tmp_path / "out") as folder:
        (folder / "new").write_text("new")
        assert _files(tmp_path / "out") == {"old"}
    assert _files(tmp_path) == {"out", "out/new"}


def test_a_failure_leaves_the_old_folder_and_nothing_beside_it(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    with pytest.raises(RuntimeError, match="disk"), atomic_directory(tmp_path / "out") as folder:
        (folder / "new").write_text("half")
        raise RuntimeError("disk")
    assert _files(tmp_path) == {"out", "out/old"}


@pytest.mark.parametrize("replaced", [False, True])
def test_what_a_killed_attempt_left_is_removed(replaced: bool, tmp_path: Path) -> None:
    for name in (".out.partial", ".out.old") if replaced else (".out.partial",):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").write_text("half")
    with atomic_directory(tmp_path / "out") as folder:
        assert _files(folder) == set()
        (folder / "a").write_text("new")
    assert _files(tmp_path) == {"out", "out/a"}


def test_a_relative_path_is_taken_from_where_it_was_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with atomic_directory(Path("out")) as folder:
        (folder / "a").write_text("new")
        monkeypatch.chdir("/")
    assert _files(tmp_path) == {"out", "out/a"}


def test_a_folder_is_written_by_one_at_a_time(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with atomic_directory(out) as folder:
        (folder / "a").write_text("first")
        refusal = rf"--out: got '{out}', which another process is writing, expected none"
        with pytest.raises(ConfigError, match=refusal), atomic_directory(out, "--out"):
            pass
    assert (out / "a").read_text() == "first"
    with atomic_directory(out) as folder:
        (folder / "a").write_text("second")
    assert _files(tmp_path) == {"out", "out/a"} and (out / "a").read_text() == "second"


def test_what_came_since_the_first_look_is_not_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    check_empty(out)
    with atomic_directory(out) as folder:
        (folder / "a").write_text("another's")
    with (
        pytest.raises(ConfigError, match="is not empty"),
        atomic_directory(out, check=lambda: check_empty(out)),
    ):
        pass
    assert _files(tmp_path) == {"out", "out/a"}


def test_only_a_new_or_empty_folder_is_free(tmp_path: Path) -> None:
    check_empty(tmp_path / "new")
    check_empty(tmp_path)
    (tmp_path / "file").write_text("")
    occupied = rf"directory: got '{tmp_path}', which is not empty; expected a new folder"
    with pytest.raises(ConfigError, match=occupied):
        check_empty(tmp_path, "directory")
    with pytest.raises(ConfigError, match=rf"directory: got the file {tmp_path}/file, expected a"):
        check_empty(tmp_path / "file", "directory")


@pytest.mark.parametrize("key", ["model.path", "adapter.path"])
@pytest.mark.parametrize("field", ["output_dir", "export.path", "--out"])
@pytest.mark.parametrize("inside", [".", "run/a", "../model/run", "link/run"])
def test_nothing_is_written_into_a_source(tmp_path: Path, key: str, field: str, inside: str):
    model = tmp_path / "model"
    (tmp_path / "run").mkdir()
    (model / "run").mkdir(parents=True)
    (model / ("config.json" if key == "model.path" else "adapter_config.json")).touch()
    (model / "link").symlink_to(model)
    file = tmp_path / "run.yaml"
    file.write_text("model: {path: m}\ndata: {train: rows.jsonl}\noutput_dir: run\n")
    paths = {"model.path": "organization/name", "output_dir": str(tmp_path / "run")}
    paths |= {key: str(model)} | ({field: str(model / inside)} if field != "--out" else {})
    config = load_config(file, ["data.train=rows.jsonl", *(f"{k}={v}" for k, v in paths.items())])
    with pytest.raises(ConfigError) as caught:
        if field == "--out":
            check_replaceable(model / inside, config, "run", "--out")
        check_outputs(config)
    assert str(caught.value) == (
        f"{field}: got '{model / inside}', which lies in {key} ('{model}') or is that folder, "
        "expected another: a source stays as it is; choose a folder outside of it"
    )
    check_outputs(config.model_copy(update={"output_dir": f"{model}2", "export": ExportSection()}))


def test_what_will_be_removed_counts_as_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    leftovers = leftovers_of(out)
    for folder, size in zip(leftovers, (30_000, 5_000), strict=True):
        (folder / "deep").mkdir(parents=True)
        (folder / "deep" / "half").write_bytes(b"x" * size)
    (leftovers[0] / "again").hardlink_to(leftovers[0] / "deep" / "half")  # room twice named: unsure
    check_room(out, {"it": 5_100}, "--out", leftovers)
    for needed, removed in ((5_101, leftovers), (101, ()), (101, [tmp_path / "none"])):
        with pytest.raises(ConfigError, match="--out: got 0.0 MiB free at"):
            check_room(out, {"it": needed}, "--out", removed)
    with atomic_directory(out):
        assert not (leftovers[0] / "deep").exists() and not leftovers[1].exists()


def test_a_file_system_without_a_size_has_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing = shutil.disk_usage(tmp_path)._replace(total=0, used=0, free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: nothing)
    check_room(tmp_path, {"it": 2**60}, "--out")


@pytest.mark.parametrize("below", [".", "run", "deep/run"])
def test_a_link_to_nowhere_is_no_folder(below: str, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigError) as caught:
        check_possible(link / below, "output_dir")
    assert str(caught.value) == (
        f"output_dir: got the link {link} to '{tmp_path}/nowhere', which is not there, expected a "
        "folder; make it, or remove the link"
    )
    (tmp_path / "nowhere").mkdir()
    check_possible(link / below, "output_dir")


@pytest.mark.parametrize("after", ["the look", "the question"])
def test_a_folder_that_another_run_removes_meanwhile_is_possible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: str
) -> None:
    """What it stood in is asked then: it is no file, and not read-only."""
    folder, stat, ask = tmp_path / "run", Path.stat, os.access
    folder.mkdir()

    def looked(path: Path, **options: bool) -> os.stat_result:
        found = stat(path, **options)
        if path == folder and after == "the look" and options.get("follow_symlinks", True):
            folder.rmdir()
        return found

    def asked(path: Path, mode: int) -> bool:
        if path == folder and after == "the question":
            folder.rmdir()
        return ask(path, mode)

    monkeypatch.setattr(Path, "stat", looked)
    monkeypatch.setattr(os, "access", asked)
    check_possible(folder, "output_dir")
    assert not os.path.lexists(folder)


def test_the_room_is_where_a_folder_stood_that_another_run_removes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, usage = tmp_path / "run", shutil.disk_usage
    folder.mkdir()

    def removed(path: Path) -> object:
        if path == folder:
            folder.rmdir()
        return usage(path)

    monkeypatch.setattr(shutil, "disk_usage", removed)
    check_room(folder, {"it": 0}, "--out")
    assert not folder.exists()
