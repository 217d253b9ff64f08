# SPDX-License-Identifier: Apache-2.0
"""Exports on their way to the hub: what is refused before, what arrives, what happens again."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import hub_server
import huggingface_hub
import pytest
import small_run
from hub_server import Hub, Repository
from huggingface_hub import HfApi

from dsjax import train
from dsjax.config import ExportSection
from dsjax.distributed.processes import Hosts
from dsjax.errors import ConfigError
from dsjax.export.folder import write_manifest
from dsjax.export.push import check_push, is_pushed, push_export
from dsjax.training.run_dir import RunDir

NAME = "me/tiny"
SECTION = ExportSection(push_to_hub=NAME)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub that this process uses, with a token that may write."""
    with hub_server.served() as hub:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
        monkeypatch.setenv("HF_TOKEN", hub_server.TOKEN)
        yield hub


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run with an export of two files."""
    run = RunDir(tmp_path / "run")
    export(run, {"config.json": "{}", "model.safetensors": "weights"})
    return run


def export(run: RunDir, files: dict[str, str], step: int = 7) -> None:
    """Replace the export."""
    shutil.rmtree(run.export, ignore_errors=True)
    run.export.mkdir(parents=True)
    for name, text in files.items():
        (run.export / name).write_text(text)
    write_manifest(run.export, {"run": "this", "step": step, "model": "/home/me/model"})


def texts(hub: Hub) -> dict[str, str]:
    """What the repository holds."""
    return {name: data.decode() for name, data in hub.repositories[NAME].files.items()}


def refusal(section: ExportSection = SECTION) -> str:
    """The refusal before a run."""
    with pytest.raises(ConfigError) as caught:
        check_push(section, primary=True)
    return str(caught.value)


def test_a_proven_export_is_uploaded_once(
    hub: Hub, run: RunDir, capsys: pytest.CaptureFixture
) -> None:
    check_push(SECTION, primary=True)
    assert not is_pushed(run, SECTION)
    assert push_export(run, SECTION, Hosts()) is None
    assert f"pushed to {hub.url}/{NAME}" in capsys.readouterr().err
    assert hub.repositories[NAME].private
    # Not the manifest, which names a folder of this machine.
    assert texts(hub) == {"config.json": "{}", "model.safetensors": "weights"}
    assert hub.commits == ["Step 7, by dsjax"]
    assert is_pushed(run, SECTION)
    assert push_export(run, SECTION, Hosts()) is None
    assert len(hub.commits) == 1


def test_another_export_replaces_its_own_files_and_no_others(hub: Hub, run: RunDir) -> None:
    assert push_export(run, SECTION, Hosts()) is None
    hub.repositories[NAME].files["picture[1].png"] = b"somebody's"
    export(run, {"adapter_config.json": "{}"}, step=9)
    assert not is_pushed(run, SECTION)
    assert push_export(run, SECTION, Hosts()) is None
    assert texts(hub) == {"adapter_config.json": "{}", "picture[1].png": "somebody's"}
    assert hub.commits[-1] == "Step 9, by dsjax"


def test_another_repository_gets_the_same_export(hub: Hub, run: RunDir) -> None:
    assert push_export(run, SECTION, Hosts()) is None
    other = ExportSection(push_to_hub="me/other", hub_private_repo=False)
    assert not is_pushed(run, other)
    assert push_export(run, other, Hosts()) is None
    assert not hub.repositories["me/other"].private
    assert texts(hub) == {"config.json": "{}", "model.safetensors": "weights"}


def test_an_upload_that_fails_says_how_to_try_again(hub: Hub, run: RunDir) -> None:
    hub.broken = True
    failure = push_export(run, SECTION, Hosts())
    message = str(failure)
    assert message.startswith("export.push_to_hub: got HfHubHTTPError: ")
    assert f"while uploading to '{NAME}' at {hub.url}" in message
    again = f"hf upload {NAME} {run.export} --exclude dsjax_export.json --private"
    assert message.endswith(f"Run the same command again, or: {again}")
    assert not is_pushed(run, SECTION)
    hub.broken = False
    assert push_export(run, SECTION, Hosts()) is None
    assert is_pushed(run, SECTION)


def test_what_is_wrong_with_a_card_is_told(hub: Hub, run: RunDir) -> None:
    export(run, {"README.md": "---\nbase_model: /home/me/model\n---\n"})
    says = 'got ValueError: Invalid metadata in README.md. - "base_model" with value "/home/me/mod'
    assert says in str(push_export(run, SECTION, Hosts()))


@pytest.mark.parametrize("text", ["", "{", "[]", '{"manifest": 1}'])
def test_a_damaged_record_means_that_nothing_was_pushed(hub: Hub, run: RunDir, text: str) -> None:
    run.pushed.write_text(text)
    assert not is_pushed(run, SECTION)
    assert push_export(run, SECTION, Hosts()) is None
    assert is_pushed(run, SECTION)


def test_without_a_token_nothing_begins(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    assert refusal().startswith(
        f"export.push_to_hub: got '{NAME}', expected a token that {hub.url} takes "
        "(LocalTokenNotFoundError: "
    )
    assert refusal().endswith("run `hf auth login`, or set HF_TOKEN")
    check_push(SECTION, primary=False)  # another process needs none
    check_push(ExportSection(), primary=True)


@pytest.mark.parametrize("token", ["hf_wrong", hub_server.READ_TOKEN])
def test_a_token_that_cannot_write_is_refused(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, token: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    says = "a token that may only read" if token == hub_server.READ_TOKEN else "Invalid user token"
    assert says in refusal()


def test_what_everybody_could_read_is_refused(hub: Hub) -> None:
    hub.repositories[NAME] = Repository(private=False)
    assert refusal() == (
        f"export.push_to_hub: got '{NAME}', which everybody can read, expected a private or a new "
        "repository; choose another, or set export.hub_private_repo=false"
    )
    check_push(ExportSection(push_to_hub=NAME, hub_private_repo=False), primary=True)
    hub.repositories[NAME].private = True
    check_push(SECTION, primary=True)


@pytest.mark.usefixtures("hub")
def test_a_name_that_cannot_be_is_refused() -> None:
    assert refusal(ExportSection(push_to_hub="me/a..b")).startswith(
        "export.push_to_hub: got 'me/a..b', expected organization/name; "
    )


@pytest.mark.slow
def test_a_run_is_pushed_and_a_finished_one_again_where_that_is_missing(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = small_run.write_inputs(
        tmp_path,
        "lora",
        training={"max_steps": 1, "eval_steps": None},
        data={"eval": None},
        export={"format": "peft", "push_to_hub": NAME},
    )
    words, out = ["--config", str(file)], tmp_path / "run" / "export"
    hub.broken = True
    with pytest.raises(ConfigError, match="the same command again"):
        train.main(words)
    assert (out / "adapter_config.json").is_file()  # the export stays
    assert hub.repositories[NAME].files == {}
    hub.broken = False
    assert train.main([*words, "--dry-run"]) == 0
    assert f"dry run: {out} is not uploaded" in capsys.readouterr().err
    assert hub.repositories[NAME].files == {}
    assert train.main(words) == 0
    said = capsys.readouterr().err
    assert "pushed to" in said and "nothing to do" not in said
    assert hub.repositories[NAME].files == {
        str(path.relative_to(out)): path.read_bytes()
        for path in out.rglob("*")
        if path.is_file() and path.name != "dsjax_export.json"
    }
    assert train.main(words) == 0
    assert "nothing to do" in capsys.readouterr().err
    assert len(hub.commits) == 1

    def unreachable(self: HfApi) -> None:
        raise ConnectionError

    monkeypatch.setattr(
        HfApi, "whoami", unreachable
    )  # it is asked where something is to be uploaded
    assert train.main(words) == 0
    record = json.loads((tmp_path / "run" / "pushed.json").read_text())
    assert (record["endpoint"], record["repository"]) == (hub.url, NAME)
