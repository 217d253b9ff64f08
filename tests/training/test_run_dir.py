# SPDX-License-Identifier: Apache-2.0
"""What an earlier run left decides what may follow it: it protects results, not attempts."""

import json
import shutil
from contextlib import closing
from pathlib import Path

import jax.numpy as jnp
import pytest

from dsjax import config as configuration
from dsjax.config import LoggingSection, RunConfig
from dsjax.distributed.processes import Hosts
from dsjax.errors import ConfigError
from dsjax.export.folder import check_continues
from dsjax.training.checkpoint import Checkpointer
from dsjax.training.metrics_log import MetricsLog, read_metrics
from dsjax.training.resume import ResumePoint, find_resume_point, split_as_before
from dsjax.training.run_dir import MANIFEST, RunDir


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    """The configuration of a run that wrote it, made an empty folder of checkpoints, and ended."""
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    words = {"model": {"path": "m"}, "data": {"train": "t"}, "output_dir": str(run)}
    config = RunConfig.model_validate(words)
    (run / "config.yaml").write_text(configuration.to_yaml(config))
    return config


def test_the_files_of_a_run_have_these_names(config: RunConfig, tmp_path: Path):
    run = RunDir.of(config)
    files = (run.config, run.metrics, run.checkpoints, run.tensorboard, run.loss_plot)
    assert [path.relative_to(config.output_dir).as_posix() for path in files] == [
        *("config.yaml", "metrics.jsonl", "checkpoints", "tensorboard", "training_loss.png"),
    ]
    others = (run.eval_results, run.export, run.lock)
    names = ["eval_results.json", "export", ".dsjax.lock"]
    assert [path.name for path in others] == names and {p.parent for p in others} == {run.path}
    assert RunDir(run.path, str(tmp_path / "out")).export == tmp_path / "out"


def smaller(config: RunConfig) -> RunConfig:
    """What troubleshooting.md advises to a run that is out of memory."""
    return config.model_copy(
        update={"training": config.training.model_copy(update={"batch_size": 1})}
    )


def save_step(run: Path, config: RunConfig) -> None:
    with closing(Checkpointer(run / "checkpoints", config.checkpoint)) as saver:
        saver.save(1, {"x": jnp.ones(2)}, {"started": "2026-01-01T00:00:00"}, force=True)


def summarise(run: Path, config: RunConfig) -> None:
    (run / "metrics.jsonl").write_text('{"step": 9, "train_loss": 1.5}\n')


def export(run: Path, config: RunConfig) -> None:
    (run / "export").mkdir()
    (run / "export" / MANIFEST).write_text(json.dumps({"run": "this"}))


RESULTS = [save_step, summarise, export]


@pytest.mark.parametrize("removed", ["nothing", "checkpoints"])
def test_an_attempt_that_saved_nothing_stands_in_no_way(config: RunConfig, removed: str):
    run = Path(config.output_dir)
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 3.0}\n')
    (run / "checkpoints" / "5.orbax-checkpoint-tmp-1").mkdir()
    if removed != "nothing":
        shutil.rmtree(run / removed)
    for same in (config, smaller(config)):
        found = find_resume_point(same)
        assert found.step == 0 and not found.meta


@pytest.mark.parametrize("leave", RESULTS, ids=lambda leave: leave.__name__)
def test_results_are_protected(config: RunConfig, leave):
    run = Path(config.output_dir)
    leave(run, config)
    assert find_resume_point(config).step == (1 if leave is save_step else 0)
    with pytest.raises(ConfigError, match="holds a run with other training.batch_size, expected"):
        find_resume_point(smaller(config))


def test_an_export_elsewhere_is_a_result(config: RunConfig, tmp_path: Path):
    export(tmp_path, config)
    section = config.export.model_copy(update={"path": str(tmp_path / "export")})
    run, old = Path(config.output_dir), config.model_copy(update={"export": section})
    (run / "config.yaml").write_text(configuration.to_yaml(old))
    with pytest.raises(ConfigError, match="with other training.batch_size"):
        find_resume_point(smaller(config))


def test_a_file_of_another_s_that_is_named_like_ours_stays(config: RunConfig):
    run = Path(config.output_dir)
    (run / "config.yaml").write_text("services: {web: {image: nginx}}\n")
    with pytest.raises(ConfigError, match="whose config.yaml is not one that a run wrote"):
        find_resume_point(config)


def test_lines_of_the_attempt_are_not_mixed_with_the_new_ones(tmp_path: Path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "eval_loss": 3.0}\n')
    with MetricsLog(RunDir(tmp_path), LoggingSection(report_to=[]), 0) as log:
        assert not log.evaluated(2)
        log.log(1, {"loss": 0.5})
    assert [row.get("loss") for row in read_metrics(file)] == [0.5]


def test_other_contents_are_named_before_the_export_that_they_make_another_s(config: RunConfig):
    export(Path(config.output_dir), config)
    began = ResumePoint(3, "2026-01-01T00:00:00", {"contents": {"adapter.path": "a"}})
    with pytest.raises(ConfigError, match=r"^adapter.path: got other contents \(b\) than those"):
        check_continues(began, config, "merged", 4, {"adapter.path": "b"})


@pytest.mark.parametrize("began", [None, 8, 0.25])
def test_a_start_without_the_held_out_rows_parts_them_as_before(config: RunConfig, began):
    earlier = ResumePoint(3, "2026-01-01T00:00:00", {}, began)
    assert split_as_before(config, earlier, Hosts()).data.val_size == began
    for keys in ({"val_size": 5}, {"eval": ["rows.jsonl"]}):
        given = config.model_copy(update={"data": config.data.model_copy(update=keys)})
        assert split_as_before(given, earlier, Hosts()) is given
