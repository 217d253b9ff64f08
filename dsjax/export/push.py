# SPDX-License-Identifier: Apache-2.0
"""Upload a proven export to the Hugging Face hub.

In: the export of a run, and `export.push_to_hub`. Out: a repository with the export's files, and a
record in the output directory of what was uploaded, by which the same export is not uploaded again.
Not done here: writing the export (`run`). huggingface_hub finds the token (HF_TOKEN, or what `hf
auth login` left) and the server (HF_ENDPOINT).
"""

import glob
import json
import shlex
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from dsjax.buckets import Bucket, Place
from dsjax.config import ExportSection
from dsjax.distributed.processes import Hosts
from dsjax.errors import ConfigError
from dsjax.training.run_dir import MANIFEST, RunDir, read_manifest
from dsjax.weights.folders import write_atomic


def check_push(section: ExportSection, primary: bool) -> None:
    """Refuse to begin where the hub would not take the export at the end; nothing is written.

    Args:
        section: the config's `export` section.
        primary: whether this is the process that uploads; the others need no token.

    Raises:
        ConfigError: no such name can be, there is no token or one that may not write, the hub
            cannot be reached, or everybody could read what is to be private.
    """
    name = section.push_to_hub
    if name is None or not primary:
        return
    api = HfApi()
    try:
        validate_repo_id(name)
        role = api.whoami().get("auth", {}).get("accessToken", {}).get("role")
        public = section.hub_private_repo and _is_public(api, name)
    except HFValidationError as error:
        raise ConfigError(
            f"export.push_to_hub: got {name!r}, expected organization/name; {error}"
        ) from error
    except Exception as error:  # of huggingface_hub's HTTP library, another one in each version
        raise ConfigError(
            f"export.push_to_hub: got {name!r}, expected a token that {api.endpoint} takes "
            f"({_reason(error)}); run `hf auth login`, or set HF_TOKEN"
        ) from error
    if role == "read":
        raise ConfigError(
            f"export.push_to_hub: got {name!r} with a token that may only read, expected one that "
            f"may write; make one at {api.endpoint}/settings/tokens"
        )
    if public:
        raise ConfigError(
            f"export.push_to_hub: got {name!r}, which everybody can read, expected a private or a "
            "new repository; choose another, or set export.hub_private_repo=false"
        )


def _is_public(api: HfApi, name: str) -> bool:
    """Whether a repository is there for everybody to read."""
    try:
        return not api.model_info(name).private
    except RepositoryNotFoundError:
        return False


def is_pushed(run: RunDir, section: ExportSection) -> bool:
    """Whether all is done: the export as it is was uploaded, or is not to be."""
    return section.push_to_hub is None or _read_record(run.pushed) == _record(run, section)


def push_export(run: RunDir, section: ExportSection, hosts: Hosts) -> ConfigError | None:
    """Upload the export of a run, unless it was; of several processes the first does.

    Returns:
        What went wrong, for the caller to raise when all else is done.
    """
    problem = hosts.broadcast_from_primary(lambda: _push(run, section))
    return ConfigError(problem) if problem else None


def _push(run: RunDir, section: ExportSection) -> str:
    """Upload; returns the problem, empty if there is none."""
    if is_pushed(run, section):
        return ""
    api, name, record = HfApi(), section.push_to_hub, _record(run, section)
    assert name is not None
    # Files of an earlier upload that this export has no more: the shards of a merged model beside
    # an adapter would be another model. What others added to the repository stays.
    earlier = _read_record(run.pushed)
    same_place = all(earlier.get(key) == record[key] for key in ("endpoint", "repository"))
    files = _files(record)
    stale = [file for file in _files(earlier) if same_place and file not in files]
    try:
        api.create_repo(name, private=section.hub_private_repo, exist_ok=True)
        with copied_here(run.export, files) as folder:
            commit = api.upload_folder(
                repo_id=name,
                folder_path=folder,
                ignore_patterns=[MANIFEST],  # it names folders of this machine
                delete_patterns=[glob.escape(file) for file in stale] or None,
                commit_message=f"Step {record['manifest'].get('step')}, by dsjax",
            )
    except Exception as error:  # see check_push
        private = ["--private"] if section.hub_private_repo else []
        words = ["hf", "upload", name, str(run.export), "--exclude", MANIFEST, *private]
        again = shlex.join(words)
        return (
            f"export.push_to_hub: got {_reason(error)} while uploading to {name!r} at "
            f"{api.endpoint}, expected it to be taken; the export is in {str(run.export)!r}. Run "
            f"the same command again, or: {again}"
        )
    write_atomic(run.pushed, json.dumps(record) + "\n")
    print(f"pushed to {commit.repo_url}", file=sys.stderr)
    return ""


@contextmanager
def copied_here(folder: Place, files: Sequence[str]) -> Iterator[Path]:
    """Give a folder on this machine with the files of one that may lie in a bucket."""
    if not isinstance(folder, Bucket):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="dsjax-push-") as here:
        for name in files:
            folder.download(name, Path(here, name))
        yield Path(here)


def _reason(error: Exception) -> str:
    """Write what the hub says in one line: what is wrong with a card stands in its second."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _record(run: RunDir, section: ExportSection) -> dict[str, Any]:
    """Say what an upload of the export as it is would be."""
    return {
        "endpoint": HfApi().endpoint,
        "repository": section.push_to_hub,
        "manifest": read_manifest(run.export) or {},
    }


def _read_record(file: Path) -> Mapping[str, Any]:
    """Read what was uploaded last; nothing, if no record of ours is there."""
    try:
        record = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    except (ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def _files(record: Mapping[str, Any]) -> list[str]:
    manifest = record.get("manifest")
    files = manifest.get("files") if isinstance(manifest, dict) else None
    return list(files) if isinstance(files, dict) else []
