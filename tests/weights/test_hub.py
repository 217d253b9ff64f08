# SPDX-License-Identifier: Apache-2.0
"""Models of the hub: what is downloaded, and what happens without a network."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import hub_server
import huggingface_hub
import numpy as np
import pytest
import torch

from dsjax.errors import ConfigError
from dsjax.weights.hf_directory import HFSource, SafetensorsWriter, open_source
from dsjax.weights.load import open_checkpoint
from dsjax.weights.write import write_checkpoint

MODELS = Path(__file__).parents[1] / "model_configs"
A = np.arange(12, dtype=np.float32).reshape(4, 3)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """The files of the smallest model."""
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with SafetensorsWriter(tmp_path / "model.safetensors", [("a", A.dtype, A.shape)]) as writer:
        writer.append("a", A)
    return tmp_path


class Hub:
    """Stands for the hub: a repository's files in a directory, and a cache that starts empty."""

    def __init__(self, files: Path, cache: Path) -> None:
        self.files, self.cache, self.online = files, cache, True

    def model_info(self, name: str, revision: str | None = None) -> SimpleNamespace:
        assert (name, revision) == ("deepseek-ai/tiny", "v1")
        if not self.online:
            raise ConnectionError("no route\nto the hub")
        files = sorted(file for file in self.files.rglob("*") if file.is_file())
        names = [str(file.relative_to(self.files)) for file in files]
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in names])

    def snapshot_download(
        self,
        name: str,
        revision: str | None,
        allow_patterns: list[str],
        local_files_only: bool = False,
    ) -> str:
        if not local_files_only:
            if not self.online:
                raise ConnectionError("lost")
            for pattern in allow_patterns:
                (self.cache / pattern).parent.mkdir(exist_ok=True)
                shutil.copy(self.files / pattern, self.cache / pattern)
        elif not any(self.cache.iterdir()):
            raise FileNotFoundError("not cached")
        return str(self.cache)

    def open(self, weights: bool = True) -> HFSource:
        return open_source("deepseek-ai/tiny", "v1", weights)

    def cached(self) -> list[str]:
        return sorted(file.name for file in self.cache.iterdir())


@pytest.fixture
def hub(
    repository: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Hub:
    """A repository with both formats, code and a sub-folder, behind huggingface_hub."""
    fake = Hub(repository, tmp_path_factory.mktemp("cache"))
    torch.save({"a": torch.tensor(A)}, repository / "pytorch_model.bin")
    for name in ("tokenizer.json", "modeling_tiny.py", "LICENSE", ".gitattributes", "model.gguf"):
        (repository / name).write_text("{}")
    (repository / "original").mkdir()
    (repository / "original" / "model.safetensors").write_text("")
    monkeypatch.setattr(huggingface_hub, "model_info", fake.model_info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.snapshot_download)
    return fake


AUX = ["LICENSE", "config.json"]


def test_hub_prefers_safetensors(hub: Hub) -> None:
    assert (hub.open().read("a") == A).all()
    assert hub.cached() == [*AUX, "model.safetensors", "tokenizer.json"]


def test_hub_with_torch_files_only(hub: Hub) -> None:
    (hub.files / "model.safetensors").unlink()
    assert (hub.open().read("a") == A).all()
    assert hub.cached() == [*AUX, "pytorch_model.bin", "tokenizer.json"]


def test_hub_without_weights(hub: Hub) -> None:
    assert hub.open(weights=False).config == {"model_type": "llama"}
    assert hub.cached() == [*AUX, "tokenizer.json"]


def test_hub_unreachable_uses_the_cache(hub: Hub) -> None:
    hub.open()
    hub.online = False
    assert (hub.open().read("a") == A).all()


@pytest.mark.parametrize("partial", [False, True])
def test_hub_unreachable_and_not_cached(hub: Hub, partial: bool) -> None:
    hub.online = False
    if partial:
        (hub.cache / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError) as caught:
        hub.open()
    assert str(caught.value) == (
        "model.path: got 'deepseek-ai/tiny' at revision 'v1', expected a local directory or a hub "
        "repository that is cached or can be downloaded; there is no such directory, it is not in "
        "the cache, and the hub could not be used (ConnectionError: no route to the hub)"
    )


def test_hub_fails_during_the_download(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> str:
        raise RuntimeError("quota")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ConfigError, match=r"the hub could not be used \(RuntimeError: quota\)"):
        hub.open()


def test_hub_repository_without_config_is_not_downloaded(hub: Hub) -> None:
    (hub.files / "config.json").unlink()
    with pytest.raises(ConfigError) as caught:
        hub.open()
    assert str(caught.value) == (
        "model.path: got 'deepseek-ai/tiny', expected a model directory with config.json; "
        "found .gitattributes, LICENSE, model.gguf, model.safetensors, modeling_tiny.py, "
        "pytorch_model.bin, tokenizer.json"
    )
    assert hub.cached() == []


TEMPLATES = ("assets/chat_template.jinja", "additional_chat_templates/tool_use.jinja")


def test_hub_templates_in_sub_folders(hub: Hub) -> None:
    for name in (*TEMPLATES, "assets/trajectory.html"):
        (hub.files / name).parent.mkdir(exist_ok=True)
        (hub.files / name).write_text(f"{name} of the hub")
    source = hub.open()
    kept = {str(file.relative_to(source.directory)) for file in source.aux_files()}
    assert kept == {*AUX, "tokenizer.json", *TEMPLATES}
    assert not (hub.cache / "assets/trajectory.html").exists()
    out = hub.files.parent / "out"
    out.mkdir()
    write_checkpoint(source, out, {})
    assert all((out / name).read_text() == f"{name} of the hub" for name in TEMPLATES)


QUANTISED = [
    {"quant_method": "bitsandbytes", "load_in_4bit": True},
    {"quant_method": "awq", "bits": 4},
    {"quant_method": "gptq", "bits": 4},
    {"group_size": 64, "bits": 4},
]


@pytest.mark.parametrize("section", QUANTISED, ids=str)
@pytest.mark.parametrize("key", ["quantization_config", "quantization"])
def test_hub_model_that_is_refused_costs_no_shard(hub: Hub, key: str, section: dict) -> None:
    config = json.loads((MODELS / "deepseek_llm_7b/config.json").read_text())
    (hub.files / "config.json").write_text(json.dumps(config | {key: section}))
    with pytest.raises(ConfigError, match=f"config.json {key}"):
        open_checkpoint("deepseek-ai/tiny", "v1")
    assert not [name for name in hub.cached() if name.endswith((".safetensors", ".bin"))]


@pytest.mark.parametrize("fault", ["model_type", "names"])
def test_hub_model_of_another_kind_costs_no_shard(hub: Hub, fault: str) -> None:
    config = json.loads((MODELS / "deepseek_llm_7b/config.json").read_text())
    if fault == "model_type":
        config["model_type"] = "deepseek_v4"
    (hub.files / "config.json").write_text(json.dumps(config))
    (hub.files / "model.safetensors").rename(hub.files / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"model.layers.0.q.qweight": "model-00001-of-00002.safetensors"}}
    (hub.files / "model.safetensors.index.json").write_text(json.dumps(index))
    says = "model_type: got 'deepseek_v4'" if fault == "model_type" else "q.qweight: got a tensor"
    with pytest.raises(ConfigError, match=says):
        open_checkpoint("deepseek-ai/tiny", "v1")
    assert "model.safetensors.index.json" in hub.cached()
    assert not [name for name in hub.cached() if name.endswith((".safetensors", ".bin"))]


def test_hub_adapter_beside_weights_costs_no_shard(hub: Hub) -> None:
    (hub.files / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="got 'deepseek-ai/tiny' with weights and adapter_config"):
        hub.open()
    assert not [name for name in hub.cached() if name.endswith((".safetensors", ".bin"))]


def test_hub_code_of_a_model_that_transformers_does_not_have(hub: Hub) -> None:
    auto_map = {"AutoConfig": "modeling_tiny.Config"}
    config = {"model_type": "deepseek", "auto_map": auto_map}
    (hub.files / "config.json").write_text(json.dumps(config))
    (hub.files / "train.py").write_text("")
    names = [file.name for file in hub.open().aux_files()]
    assert names == [*AUX, "modeling_tiny.py", "tokenizer.json"]


OFFLINE = """
import sys
from dsjax.errors import ConfigError
from dsjax.weights.hf_directory import open_source

print(open_source("deepseek-ai/tiny").read("a").sum())
for name, revision in (("deepseek-ai/other", None), ("deepseek-ai/tiny", "v2")):
    try:
        open_source(name, revision)
    except ConfigError as error:
        print(error)
"""


def test_real_cache_offline(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The hub library itself, which reads its environment when it is imported."""
    home = tmp_path_factory.mktemp("home")
    cached = home / "hub" / "models--deepseek-ai--tiny"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    shutil.copytree(repository, cached / "snapshots" / ("0" * 40))
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(home)}
    environment.pop("HF_HUB_CACHE", None)
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE], env=environment, capture_output=True, text=True, check=True
    )
    total, other, revision = done.stdout.splitlines()
    assert total == "66.0"
    assert other.startswith("model.path: got 'deepseek-ai/other', expected a local directory or")
    assert revision.startswith("model.path: got 'deepseek-ai/tiny' at revision 'v2', expected")
    assert "the hub could not be used (OfflineModeIsEnabled: " in revision


MIRROR = """
import sys
from dsjax.weights.hf_directory import open_source

source = open_source("deepseek-ai/tiny")
print(source.read("a").sum(), *sorted(file.name for file in source.aux_files()))
"""


def test_a_model_comes_from_the_server_that_hf_endpoint_names(
    repository: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The hub library itself; a private repository, which takes the token that it finds."""
    (repository / "pytorch_model.bin").write_text("not wanted")
    home = tmp_path_factory.mktemp("home")
    with hub_server.served() as served:
        served.add("deepseek-ai/tiny", repository, private=True)
        settings = {
            "HF_ENDPOINT": served.url,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": hub_server.TOKEN,
        }
        environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_CACHE"} | settings
        done = subprocess.run(
            [sys.executable, "-c", MIRROR],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
    assert done.stdout == "66.0 config.json\n"
    fetched = {path.name for path in home.rglob("snapshots/*/*")}
    assert fetched == {"config.json", "model.safetensors"}
