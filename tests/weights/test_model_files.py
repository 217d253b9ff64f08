# SPDX-License-Identifier: Apache-2.0
"""What of a model's folder travels into an export: what is listed, what is named, nothing else."""

import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax.errors import ConfigError
from dsjax.weights.hf_directory import SafetensorsWriter, open_source
from dsjax.weights.model_files import kept_names
from dsjax.weights.write import write_checkpoint

# Of the repositories of DeepSeek's models, and transformers' names.
BELONG = (
    *("generation_config.json", "tokenizer.json", "tokenizer.model", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt", "vocab.txt", "spiece.model", "README.md"),
    *("sentencepiece.bpe.model", "chat_template.jinja", "chat_template.json", "README_WEIGHTS.md"),
    *(
        "assets/chat_template.jinja",
        "additional_chat_templates/tool_use.jinja",
        "LICENSE",
        "NOTICE",
    ),
    *("additional_chat_templates/rag.jinja", "LICENSE", "LICENSE-MODEL", "LICENSE.txt"),
    *("LICENSE-CODE", "LICENSE.DeepSeek", "LICENSE Llama3.txt", "Llama3.1-LICENSE.txt"),
    *("Tongyi Qianwen LICENSE AGREEMENT.txt", "Meta-Llama-3-LICENSE"),
    *("USE_POLICY.md", "LICENCE", "license.md", "LICENSE-2.0.txt", "MODEL_LICENSE", "Notice.txt"),
)
FOREIGN = (
    *("train.jsonl", "data.json", "notes.md", "notes.txt", "secrets.env", "backup.zip", "run.sh"),
    *("adapter_config.json.bak", "adapter_model.safetensors", "adapter_model.bin", "model.gguf"),
    *("optimizer.pt", "scheduler.pt", "rng_state_0.pth", "training_args.bin", "trainer_state.json"),
    *("events.out.tfevents.1", "all_results.json", "eval_results.json", "metrics.jsonl", "x.onnx"),
    *("modeling_deepseek.py", "configuration_deepseek.py", "train.py", "dsjax_export.json", "rows"),
    *("dsjax_checkpoint.json", "flax_model.msgpack", "tf_model.h5", "consolidated.00.pth", ".env"),
    *("quantize_config.json", "preprocessor_config.json", "training_loss.png", "config.yaml"),
    *("LICENSE.safetensors", "license_check.py", ".LICENSE", "figures/LICENSE"),
    *("LICENSE-rows.jsonl", "LICENSE.zip", "README.html.zip", "tokenizer.json.bak", "wandb.txt"),
    *("assets/trajectory.html", "assets/train.jsonl", "assets/chat_template.jinja.orig"),
    *("additional_chat_templates/notes.txt", "additional_chat_templates/run.py"),
    *("figures/benchmark.jpg", "inference/model.py", "checkpoints/README.md", "export/config.json"),
    *("pytorch_model.bin.index.json", "model.safetensors.index.json.orig", ".cache/tokenizer.json"),
)
NAMED = ("bpe.codes", "qwen.tiktoken", "tokenizer.4.0.0.json", "my-words.txt", "vocabulary")
"""What may be anybody's file, and travels where one of the two files names it."""

NEVER = ("old.safetensors", "weights.bin", "run_me.py", ".hidden", "adapter_config.json.pkl")
"""What does not travel for being named."""

FILES = st.sets(st.sampled_from([*BELONG, *FOREIGN, *NAMED, *NEVER]), max_size=24)
NAMES = st.lists(st.sampled_from([*NAMED, *NEVER, "nothing-here.txt"]), max_size=4)
ODD = st.text("abcXYZ019-_. ", min_size=1, max_size=12).map(lambda name: f"z{name}z")


def write_model(folder: Path, config: Mapping[str, Any]) -> None:
    """Write the smallest model."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    with SafetensorsWriter(folder / "model.safetensors", [("a", np.dtype("f4"), (2,))]) as writer:
        writer.append("a", np.zeros(2, np.float32))


def write(folder: Path, names: set[str]) -> None:
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"{name} of the source")


def files_in(folder: Path) -> dict[str, bytes]:
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def check_travel(names: set[str], odd: set[str], named: list[str], tokenizer: list[str]) -> None:
    """Export a folder with these files, and look at what came along."""
    with TemporaryDirectory() as root:
        folder, out = Path(root) / "model", Path(root) / "out"
        write_model(folder, {"model_type": "llama", "some": {"key": named}})
        write(folder, names | odd)
        settings = {"vocab_file": tokenizer[:1], "fast_tokenizer_files": tokenizer[1:]}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        out.mkdir()
        write_checkpoint(open_source(folder), out, {})
        expected = (names & set(BELONG)) | (names & set(NAMED) & {*named, *tokenizer})
        expected |= {"config.json", "tokenizer_config.json", "model.safetensors"}
        source = files_in(folder)
        assert files_in(out) == {name: source[name] for name in sorted(expected)}


FOLDERS = given(FILES, st.sets(ODD, max_size=3), NAMES, NAMES)


@FOLDERS
@settings(max_examples=25)
def test_what_belongs_to_a_model_travels_and_nothing_else(
    names: set[str], odd: set[str], named: list[str], tokenizer: list[str]
) -> None:
    check_travel(names, odd, named, tokenizer)


@pytest.mark.slow
@FOLDERS
@settings(max_examples=500)
def test_what_belongs_to_a_model_travels_and_nothing_else_many_times(
    names: set[str], odd: set[str], named: list[str], tokenizer: list[str]
) -> None:
    check_travel(names, odd, named, tokenizer)


def test_every_listed_name_belongs_and_no_foreign_one_does() -> None:
    assert kept_names([*BELONG, *FOREIGN, *NAMED, *NEVER], {}, {}) == sorted(BELONG)


# The repositories on the hub, as far as their lists are known.
REPOSITORIES = {
    "deepseek-ai/DeepSeek-V3": (
        ["LICENSE-CODE", "LICENSE-MODEL", "README.md", "README_WEIGHTS.md", "config.json"]
        + ["tokenizer.json", "tokenizer_config.json"],
        [".gitattributes", "configuration_deepseek.py", "modeling_deepseek.py"]
        + ["figures/benchmark.png", "figures/niah.png", "inference/convert.py"]
        + ["inference/requirements.txt", "model.safetensors.index.json"]
        + ["model-00001-of-000163.safetensors"],
    ),
    "deepseek-ai/DeepSeek-V3.1": (
        ["LICENSE", "README.md", "assets/chat_template.jinja", "config.json"]
        + ["generation_config.json", "tokenizer.json", "tokenizer_config.json"],
        ["assets/code_agent_trajectory.html", "assets/search_tool_trajectory.html"]
        + ["configuration_deepseek.py", "modeling_deepseek.py"],
    ),
    "deepseek-ai/DeepSeek-V3.2": (
        ["LICENSE", "README.md", "config.json", "generation_config.json"]
        + ["tokenizer.json", "tokenizer_config.json"],
        ["assets/paper.pdf", "encoding/encoding_dsv32.py", "encoding/README.md"]
        + ["inference/kernel.py", "inference/config_671B_v3.2.json"],
    ),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": (
        ["LICENSE", "README.md", "config.json", "generation_config.json"]
        + ["tokenizer.json", "tokenizer_config.json"],
        [".gitattributes", "figures/benchmark.jpg", "model-00001-of-000002.safetensors"],
    ),
}


@pytest.mark.parametrize("name", REPOSITORIES)
def test_repositories_of_deepseek(name: str) -> None:
    belong, other = REPOSITORIES[name]
    assert kept_names([*belong, *other], {"model_type": "deepseek_v3"}, {}) == sorted(belong)


# Code, which is copied where transformers has no class, and never run

AUTO_MAP = {"AutoModelForCausalLM": "modeling_deepseek.Model", "AutoConfig": "conf.Config"}
CODE = {
    "modeling_deepseek.py": "from .layers import A\nfrom .conf import Config\nimport os\n1 / 0\n",
    "layers.py": "import .deep\nfrom .modeling_deepseek import B\n",
    "deep.py": "from . import nothing\nfrom .absent import C\n",
    "conf.py": "\xff not python (",
    "train.py": "raise SystemExit(3)",
}


def exported(folder: Path, out: Path) -> dict[str, bytes]:
    out.mkdir()
    write_checkpoint(open_source(folder), out, {})
    return files_in(out)


def test_the_code_of_a_model_that_transformers_does_not_have_goes_along(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    write_model(folder, {"model_type": "deepseek", "auto_map": AUTO_MAP})
    for name, text in CODE.items():
        (folder / name).write_bytes(text.encode("latin-1"))
    found = exported(folder, tmp_path / "out")
    assert set(found) == {"config.json", "model.safetensors", *CODE} - {"train.py"}
    assert found["config.json"] == (folder / "config.json").read_bytes()


@pytest.mark.parametrize("kind", ["deepseek_v3", "deepseek_v2", "llama", "qwen2"])
def test_the_mention_of_code_is_dropped_where_transformers_has_the_class(
    tmp_path: Path, kind: str
) -> None:
    folder = tmp_path / "model"
    config = {"architectures": ["X"], "auto_map": AUTO_MAP, "model_type": kind, "name": "ü"}
    write_model(folder, config)
    tokenizer = {"auto_map": {"AutoTokenizer": ["conf.T", None]}, "bos_token": "<｜b｜>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    for name in CODE:
        (folder / name).write_text("raise SystemExit(3)")
    found = exported(folder, tmp_path / "out")
    assert set(found) == {"config.json", "tokenizer_config.json", "model.safetensors"}
    del config["auto_map"], tokenizer["auto_map"]
    assert list(json.loads(found["config.json"]).items()) == list(config.items())
    assert json.loads(found["tokenizer_config.json"]) == tokenizer


def test_code_of_another_repository_is_left_where_it_is(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    auto_map = {"AutoConfig": "deepseek-ai/deepseek-moe-16b-base--conf.Config"}
    write_model(folder, {"model_type": "deepseek", "auto_map": auto_map})
    (folder / "conf.py").write_text("")
    found = exported(folder, tmp_path / "out")
    assert set(found) == {"config.json", "model.safetensors"}
    assert json.loads(found["config.json"])["auto_map"] == auto_map


# Links


LINKED = ("LICENSE", "config.json", "tokenizer.json", "README.md", "assets/chat_template.jinja")


@pytest.mark.parametrize("name", [*LINKED, "model.safetensors.index.json"])
def test_a_link_out_of_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    folder, secret = tmp_path / "model", tmp_path / "secret"
    write_model(folder, {"model_type": "llama"})
    secret.write_text('{"password": 1}')
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(secret)
    with pytest.raises(ConfigError) as caught:
        open_source(folder)
    assert str(caught.value) == (
        f"model.path: got {folder / name}, a link to {secret} outside of the folder, expected the "
        "file itself; copy it into the folder"
    )


def test_a_linked_folder_of_templates_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    write_model(folder, {"model_type": "llama"})
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/a.jinja").write_text("")
    (folder / "additional_chat_templates").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="additional_chat_templates/a.jinja, a link to"):
        open_source(folder)


def test_links_that_stay_and_links_that_nobody_reads(tmp_path: Path) -> None:
    folder, secret = tmp_path / "model", tmp_path / "secret"
    write_model(folder, {"model_type": "llama"})
    secret.write_text("secret")
    (folder / "mine").write_text("yours")
    (folder / "LICENSE").symlink_to("mine")
    (folder / "notes.txt").symlink_to(secret)
    (folder / "README.md").symlink_to(tmp_path / "nowhere")
    (tmp_path / "link").symlink_to(folder)
    found = exported(tmp_path / "link", tmp_path / "out")
    assert found["LICENSE"] == b"yours" and not (tmp_path / "out/LICENSE").is_symlink()
    assert set(found) == {"LICENSE", "config.json", "model.safetensors"}


def test_links_of_the_hubs_cache_and_of_weights_are_followed(tmp_path: Path) -> None:
    write_model(tmp_path / "other", {"model_type": "llama"})
    snapshot = tmp_path / "hub/models--a--b/snapshots/0123"
    blobs = tmp_path / "hub/models--a--b/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "abc").write_bytes((tmp_path / "other/config.json").read_bytes())
    (snapshot / "config.json").symlink_to("../../blobs/abc")
    (snapshot / "model.safetensors").symlink_to(tmp_path / "other/model.safetensors")
    assert set(exported(snapshot, tmp_path / "out")) == {"config.json", "model.safetensors"}


# An adapter beside weights


@pytest.mark.parametrize("weights", [True, False])
def test_an_adapter_beside_weights_is_refused(tmp_path: Path, weights: bool) -> None:
    write_model(tmp_path, {"model_type": "llama"})
    (tmp_path / "adapter_config.json").write_text("{}")
    for adapter in (None, str(tmp_path.parent)):
        with pytest.raises(ConfigError) as caught:
            open_source(tmp_path, weights=weights, adapter=adapter)
        assert str(caught.value) == (
            f"model.path: got '{tmp_path}' with weights and adapter_config.json, expected one of "
            "the two: transformers would apply the adapter to the weights; give the folder as "
            "adapter.path too to do so here, or remove adapter_config.json to use the weights alone"
        )


def test_an_adapter_that_is_asked_for_stays_out_of_exports(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    write_model(folder, {"model_type": "llama", "names": ["adapter_config.json"]})
    (folder / "adapter_config.json").write_text("{}")
    (tmp_path / "out").mkdir()
    source = open_source(folder, adapter=f"{folder}/../model/")
    write_checkpoint(source, tmp_path / "out", {})
    assert set(files_in(tmp_path / "out")) == {"config.json", "model.safetensors"}
