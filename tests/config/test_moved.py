# SPDX-License-Identifier: Apache-2.0
"""A run's own configuration is that of the folder it lies in; any other file is read as it is."""

import shutil
from pathlib import Path

import pytest
import yaml

from dsjax.config import load_config, load_run, located, to_yaml
from dsjax.config.inputs import find_sources
from dsjax.errors import ConfigError


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model, rows and a run; the command ran in it, with relative paths."""
    folder = tmp_path / "before"
    (folder / "model").mkdir(parents=True)
    (folder / "runs/first").mkdir(parents=True)
    for name in ("a.jsonl", "b.jsonl"):
        (folder / name).touch()
    monkeypatch.chdir(folder)
    own = {
        "model": {"path": "model"},
        "data": {"train": "*.jsonl", "eval": ["a.jsonl", "someone/rows"]},
        "output_dir": "runs/first",
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(own))
    (folder / "runs/first/metrics.jsonl").touch()
    config = located(load_config(folder / "run.yaml"))
    (folder / "runs/first/config.yaml").write_text(to_yaml(config))
    return folder


def test_where_nothing_moved_nothing_changes(project: Path):
    config = load_config(project / "runs/first/config.yaml")
    assert config.output_dir == str(project / "runs/first")
    assert config.model.path == str(project / "model")
    assert config.data.train == [str(project / "*.jsonl")]
    assert config.data.eval == [str(project / "a.jsonl"), "someone/rows"]


def test_a_project_that_was_moved_is_found(project: Path):
    after = shutil.move(project, project.with_name("after"))
    config = load_config(Path(after) / "runs/first/config.yaml")
    assert config.output_dir == f"{after}/runs/first"
    assert config.model.path == f"{after}/model"
    assert config.data.train == [f"{after}/*.jsonl"]
    assert config.data.eval == [f"{after}/a.jsonl", "someone/rows"]


def test_a_run_is_not_trained_by_guess(project: Path):
    """Its own configuration names another place: it was moved, or edited for a new run."""
    file = project / "runs/first/config.yaml"
    assert load_run(file).output_dir == str(project / "runs/first")
    file.write_text(file.read_text().replace("runs/first", "runs/second"))
    here, there = project / "runs/first", project / "runs/second"
    with pytest.raises(ConfigError) as caught:
        load_run(file)
    assert str(caught.value) == (
        f"output_dir: got '{there}' in {file}, which is of the run in '{here}', expected one "
        f"place; add output_dir={here} to go on with that run, which was moved, or "
        f"output_dir={there} for a new one"
    )
    for place in (here, there):
        assert load_run(file, [f"output_dir={place}"]).output_dir == str(place)


def test_an_export_in_the_folder_moves_with_it(project: Path):
    file = project / "runs/first/config.yaml"
    inside, outside = project / "runs/first/merged", project / "merged"
    for path in (inside, outside):
        file.write_text(to_yaml(load_config(file, [f"export.path={path}"])))
        copy = shutil.copytree(project / "runs/first", project.with_name(f"copy-{path.name}"))
        expected = copy / "merged" if path is inside else outside
        assert load_config(copy / "config.yaml").export.path == str(expected)
        shutil.rmtree(copy)


def test_patterns_in_a_folder_with_a_bracket_in_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = tmp_path / "before[v2]"
    (folder / "run").mkdir(parents=True)
    (folder / "a.jsonl").touch()
    (folder / "run/metrics.jsonl").touch()
    monkeypatch.chdir(folder)
    (folder / "run.yaml").write_text("model: {path: m/m}\noutput_dir: run\n")
    config = located(load_config(folder / "run.yaml", ["data.train=*.jsonl"]))
    (folder / "run/config.yaml").write_text(to_yaml(config))
    (train,) = load_config(folder / "run/config.yaml").data.train
    assert find_sources(train, "data.train") == [f"{folder}/a.jsonl"]
    after = Path(shutil.move(folder, tmp_path / "after[*]"))
    (train,) = load_config(after / "run/config.yaml").data.train
    assert find_sources(train, "data.train") == [f"{after}/a.jsonl"]


def test_of_a_run_that_was_copied_alone_the_rest_stays(project: Path, tmp_path: Path):
    shutil.copytree(project / "runs/first", tmp_path / "copy")
    config = load_config(tmp_path / "copy/config.yaml")
    assert config.output_dir == str(tmp_path / "copy")
    assert config.model.path == str(project / "model")


def test_what_is_nowhere_keeps_its_name(project: Path, tmp_path: Path):
    (project / "model").rmdir()
    shutil.move(project / "runs/first", tmp_path / "copy")
    assert load_config(tmp_path / "copy/config.yaml").model.path == str(project / "model")


def test_a_word_of_the_command_line_wins(project: Path, tmp_path: Path):
    shutil.copytree(project / "runs/first", tmp_path / "copy")
    config = load_config(tmp_path / "copy/config.yaml", ["output_dir=elsewhere"])
    assert config.output_dir == "elsewhere"


@pytest.mark.parametrize("missing", ["metrics.jsonl", "name"])
def test_a_file_that_no_run_wrote_is_read_as_it_is(project: Path, tmp_path: Path, missing: str):
    copy = shutil.copytree(project / "runs/first", tmp_path / "copy")
    file = copy / "config.yaml"
    if missing == "name":
        file = file.rename(copy / "mine.yaml")
    else:
        (copy / missing).unlink()
    assert load_config(file).output_dir == str(project / "runs/first")


def test_a_relative_output_dir_is_a_user_s_own(project: Path):
    shutil.copy(project / "run.yaml", project / "config.yaml")
    (project / "metrics.jsonl").touch()
    assert load_config(project / "config.yaml").output_dir == "runs/first"
