# SPDX-License-Identifier: Apache-2.0
"""Whose an export's folder is: what may be replaced, and what is there already.

In: a run's configuration and what its training summed up to. Out: an `Output` with the manifest
that lies in every export, and a refusal of every folder that is not this run's own. Not done here:
what else an export holds (`run`).
"""

import glob
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsjax.buckets import Bucket, Place
from dsjax.config import RunConfig, located
from dsjax.config.paths import is_url
from dsjax.errors import ConfigError
from dsjax.training.continuation import identity
from dsjax.training.eval_results import evaluated_rows, evaluation_manifest, is_evaluated
from dsjax.training.metrics_log import read_metrics
from dsjax.training.restore import check_contents
from dsjax.training.resume import ResumePoint
from dsjax.training.run_dir import MANIFEST, RunDir, read_manifest
from dsjax.weights.drafts import file_digests
from dsjax.weights.folders import check_apart, check_empty, content


@dataclass(frozen=True)
class Output:
    """An export to be written: of what training it is, and where it goes.

    Attributes:
        config: the run's.
        form: merged or peft.
        step: the optimizer step that is exported.
        sums: of the loss and the tokens up to that step, as its checkpoint holds them.
        contents: digests of what the run reads, by its keys.
        out: the folder, where it is not the run's own (`export.path`).
        field: how messages call the folder.
    """

    config: RunConfig
    form: str
    step: int
    sums: Mapping[str, float]
    contents: Mapping[str, str]
    out: Place | None = None
    field: str = "export.path"

    @property
    def run(self) -> RunDir:
        """Return the files of the run."""
        return RunDir.of(self.config)

    @property
    def path(self) -> Place:
        """Return the folder."""
        return self.out or self.run.export

    @property
    def name(self) -> str:
        """Return the name that all starts of the run share."""
        return identity(self.config, self.contents)

    def manifest(self) -> dict[str, Any]:
        """Say what the export is; two trainings that differ in anything say different things.

        Among it is a fingerprint of the rows whose results the model card shows: it tells apart
        what the configuration does not, other rows in files of the same names.
        """
        dtype = self.config.export.dtype
        manifest = {
            "format": self.form,
            "step": self.step,
            "model": located(self.config).model.path,
            "run": self.name,
            "sums": dict(self.sums),
            "eval": evaluated_rows(self.run.path),
        }
        return manifest | ({"dtype": dtype} if dtype else {})


def write_manifest(
    folder: Path,
    manifest: Mapping[str, Any],
    kept: float | None = None,
    contents: Mapping[str, str] | None = None,
) -> None:
    """Mark a folder whose files are all written, and proven to be what they should be.

    Args:
        folder: the export.
        manifest: what it says it is.
        kept: of what training changed, the part that merged weights keep.
        contents: the digest of each file, where they are not all in the folder.
    """
    files = _contents(folder) if contents is None else contents
    text = json.dumps({**manifest, "kept": kept, "files": files})
    (folder / MANIFEST).write_text(text + "\n", "utf-8")


def is_exported(out: Place, manifest: Mapping[str, Any], min_kept: float | None) -> bool:
    """Whether a folder holds this very export, whole: every file as it was when it was proven.

    The files are read from end to end, for a damaged disk or a hand that edits leaves names and
    sizes as they are. That takes as long as one copy, and only where there is nothing else to do.
    What keeps less than `min_kept` was written when less was asked for, and is not this export.
    """
    found = read_manifest(out) or {}
    files, kept = found.pop("files", None), found.pop("kept", None)
    wanted = dict(manifest)
    for told in (found, wanted):  # the model may have been moved; `run` says which it is
        told.pop("model", None)
    if found != wanted or not isinstance(files, dict) or not isinstance(kept, float | None):
        return False
    if is_too_little(kept, min_kept):
        return False
    return files.items() <= _contents(out).items()


def is_too_little(kept: float | None, min_kept: float | None) -> bool:
    """Whether merged weights keep less of a training than was asked for; None: not measured."""
    return kept is not None and min_kept is not None and kept < min_kept


def _contents(folder: Place) -> dict[str, str]:
    """Return a digest of each file by its path in the folder, the manifest left out."""
    if isinstance(folder, Bucket):
        objects = [name for name in content(folder) if name != MANIFEST]
        return dict(zip(objects, folder.at_once(folder.digest, objects), strict=True))
    digests = file_digests(folder)
    digests.pop(MANIFEST, None)
    return digests


def check_replaceable(out: Place, config: RunConfig, run: str, field: str = "export.path") -> None:
    """Refuse to replace a folder with anything in it but the own export of the run `run`.

    Raises:
        ConfigError: what the run reads or writes lies there, or somebody's files, or the export of
            another run.
    """
    check_free(out, config, field)
    check_own(out, run, field)


def check_free(out: Place, config: RunConfig, field: str) -> None:
    """Refuse to replace what is no export at all; which run an export is of is not looked at.

    Raises:
        ConfigError: what the run reads or writes lies there, or somebody's files.
    """
    check_apart(out, field, _sources(config))
    for key, place in _needed(config):
        if _holds(out, place):
            raise ConfigError(
                f"{field}: got {str(out)!r}, in which {key} ({str(place)!r}) lies, expected a "
                "folder that holds nothing but the export"
            )
    if read_manifest(out) is None:
        check_empty(out, field)


def check_own(out: Place, run: str, field: str = "export.path") -> None:
    """Refuse to replace what is no export of the run `run`.

    Raises:
        ConfigError: somebody's files lie there, or the export of another run.
    """
    manifest = read_manifest(out)
    if manifest is None:
        check_empty(out, field)
    elif manifest.get("run") != run:
        raise ConfigError(
            f"{field}: got {str(out)!r}, which holds the export of another run (of "
            f"{manifest.get('model')!r}, step {manifest.get('step')}), expected this run's own or "
            "a new folder; choose another, or remove that one"
        )


def check_outputs(config: RunConfig) -> None:
    """Refuse to write a run or its export into the model's or the adapter's folder.

    Raises:
        ConfigError: `output_dir` or `export.path` is such a folder, or lies in one.
    """
    check_apart(config.output_dir, "output_dir", _sources(config))
    if config.export.path is not None:
        check_apart(config.export.path, "export.path", _sources(config))


def _sources(config: RunConfig) -> dict[str, str | None]:
    return {"model.path": config.model.path, "adapter.path": config.adapter.path}


def _holds(out: Place, place: str | Path) -> bool:
    """Whether a file or folder is the folder, or lies in it."""
    if isinstance(out, Bucket):
        return out.holds_place(str(place))
    return isinstance(place, Path) and place.resolve().is_relative_to(out.resolve())


def _needed(config: RunConfig) -> list[tuple[str, str | Path]]:
    """List the files and folders that a run reads or writes, with their keys; hub ids left out.

    Of what lies behind a URL, the URL.
    """
    run, data = RunDir.of(config), config.data
    read = [("model.path", config.model.path), ("adapter.path", config.adapter.path)]
    for key, sources in (("data.train", data.train), ("data.eval", data.eval or [])):
        read += [(key, name) for s in sources for name in (s, *glob.glob(s, recursive=True))]
    there = [(key, Path(name)) for key, name in read if name is not None and Path(name).exists()]
    remote = [(key, name) for key, name in read if name is not None and is_url(name)]
    written = [run.path, run.checkpoints, run.tensorboard]
    named = [run.url or run.path, *map(run.shown, written[1:])] if run.url else written
    return [*there, *remote, *(("output_dir", path) for path in named)]


def check_continues(
    earlier: ResumePoint,
    config: RunConfig,
    form: str | None,
    total: int,
    contents: Mapping[str, str],
) -> None:
    """Hold a run against the earlier one that it goes on with; nothing is written yet.

    Args:
        earlier: what `find_resume_point` found.
        config: the run's.
        form: what it exports.
        total: its steps.
        contents: digests of what it reads, by its keys.

    Raises:
        ConfigError: fewer steps than are done, other contents, or a foreign folder where the export
            goes.
    """
    run = RunDir.of(config)
    if earlier.meta:  # first: another content makes another run of it, whose export is in the way
        check_contents(contents, earlier.meta["contents"], run)
    if form is not None:
        check_replaceable(run.export, config, identity(config, contents))
    if earlier.step > total:
        raise ConfigError(
            f"training.max_steps: got {total} steps, expected at least the {earlier.step} that the "
            f"run in {str(run)!r} has done; choose another output_dir"
        )


def is_complete(
    config: RunConfig,
    eval_rows: str,
    form: str | None,
    earlier: ResumePoint,
    total: int,
    contents: Mapping[str, str],
) -> bool:
    """Whether an earlier run has finished all that takes a model: steps, evaluation, export.

    Args:
        config: the run's.
        eval_rows: fingerprint of the rows to evaluate on, empty if there are none.
        form: what the run exports.
        earlier: what it has done.
        total: its steps.
        contents: digests of what it reads, by its keys.
    """
    run = RunDir.of(config)
    results = evaluation_manifest(total, earlier.sums, eval_rows)
    if earlier.step < total or (eval_rows and not is_evaluated(run.path, results)):
        return False
    if form is not None:
        output = Output(config, form, total, earlier.sums, contents)
        return is_exported(run.export, output.manifest(), config.export.min_kept)
    rows = read_metrics(run.metrics)
    return any("train_loss" in row and row["step"] == total for row in rows)
