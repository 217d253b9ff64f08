# SPDX-License-Identifier: Apache-2.0
"""Checkpoints and adapters behind a URL give what they give from a directory, and read no more."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import memory_bucket
import numpy as np
import pytest
import tiny
import torch
from jax.sharding import NamedSharding
from memory_bucket import Bucket

import dsjax
from dsjax.config import MeshSection
from dsjax.distributed import arrays
from dsjax.distributed.mesh import make_mesh
from dsjax.distributed.sharding import Leaf, Params, leaf_shardings
from dsjax.errors import ConfigError
from dsjax.models import build
from dsjax.training.partition import make_partition
from dsjax.weights import load as loading


@pytest.fixture
def store() -> Iterator[Bucket]:
    """An empty bucket."""
    with memory_bucket.opened() as found:
        yield found


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers in four files."""
    folder = tmp_path_factory.mktemp("llama")
    return tiny.build_checkpoint(folder, "llama_gqa", num_hidden_layers=2)


@pytest.fixture(scope="module")
def fp8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Experts and attention in block-wise FP8."""
    return tiny.build_checkpoint(tmp_path_factory.mktemp("fp8"), "deepseek_v3_fp8_ue8m0")


def load(path: str | Path, mesh: Mapping[str, int], ending: str = "") -> tuple[Params, Leaf]:
    """Parameters whose path ends so, on eight devices; and the last one's leaf."""
    source = loading.open_checkpoint(str(path))
    model = build(source.config, "float32")
    loading.check_coverage(source, model)
    leaves = {p: leaf for p, leaf in make_partition(model).leaves.items() if p.endswith(ending)}
    shardings = leaf_shardings(leaves, make_mesh(MeshSection(**mesh)))
    return loading.load_base(source, model, leaves, shardings), list(leaves.values())[-1]


@pytest.mark.parametrize("piece", [2**26, 4000], ids=["whole", "pieces"])
@pytest.mark.parametrize(
    ("form", "mesh"),
    [
        ("llama", {"fsdp": 2, "tensor": 2, "data": 2}),
        ("fp8", {"fsdp": 2, "expert": 4}),
    ],
)
def test_parameters_are_those_of_the_directory(
    form: str,
    mesh: Mapping[str, int],
    piece: int,
    store: Bucket,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(arrays, "PIECE_BYTES", piece)
    folder = request.getfixturevalue(form)
    ending = ("embed_tokens.weight", "down_proj.weight", "q_proj.weight", "model.norm.weight")
    expected, _ = load(folder, mesh, ending)
    found, _ = load(store.upload(folder), mesh, ending)
    assert len(found) >= 4 and found.keys() == expected.keys()
    for path, array in found.items():
        assert array.sharding == expected[path].sharding
        assert np.asarray(array).tobytes() == np.asarray(expected[path]).tobytes(), path


def test_opening_reads_headers_and_small_files(
    llama: Path, store: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dsjax.weights.safetensors._FIRST_READ", 4096)
    url = store.upload(llama)
    source = loading.open_checkpoint(url)
    sizes = {file.name: file.stat().st_size for file in llama.iterdir()}
    aux = [name for name in sizes if ".safetensors" not in name]
    shards = [name for name in sizes if name.endswith(".safetensors")]
    whole = [(name, 0, sizes[name]) for name in (*aux, "model.safetensors.index.json")]
    assert sorted(store.reads) == sorted([*whole, *((name, 0, 4096) for name in shards)])
    assert sorted(file.name for file in source.aux_files()) == sorted(aux)
    assert all(file.parent == source.directory for file in source.aux_files())
    store.reads.clear()
    without = loading.open_checkpoint(url, weights=False)
    assert without.config == source.config and store.bytes_of(".safetensors") == 0


def test_a_long_header_takes_a_second_read(
    llama: Path, store: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dsjax.weights.safetensors._FIRST_READ", 100)
    source = loading.open_checkpoint(store.upload(llama))
    assert source.tensors == loading.open_checkpoint(str(llama)).tensors
    heads = [read for read in store.reads if read[0].endswith(".safetensors")]
    assert sorted(start for _, start, _ in heads) == [0] * 4 + [100] * 4


def only_the_first_device(monkeypatch: pytest.MonkeyPatch, count: int = 1) -> None:
    """As if this process had some of the eight devices."""
    whole = NamedSharding.addressable_devices_indices_map

    def some(sharding: NamedSharding, shape: tuple[int, ...]) -> dict:
        return dict(list(whole(sharding, shape).items())[:count])

    monkeypatch.setattr(NamedSharding, "addressable_devices_indices_map", some)
    monkeypatch.setattr(
        jax, "make_array_from_single_device_arrays", lambda shape, sharding, shards: shards[0]
    )


@pytest.mark.parametrize(
    ("form", "mesh", "ending", "read"),
    [
        # 80 rows over 8 devices, two layers
        ("llama", {"tensor": 8, "fsdp": 1}, "mlp.up_proj.weight", 2 * 10 * 48 * 4),
        ("llama", {"fsdp": 8}, "mlp.up_proj.weight", 2 * 10 * 48 * 4),
        # columns: rows are read whole
        ("llama", {"tensor": 8, "fsdp": 1}, "mlp.down_proj.weight", 2 * 48 * 80 * 4),
        ("llama", {"tensor": 8, "fsdp": 1}, "embed_tokens.weight", 36 * 48 * 4),
    ],
)
def test_a_host_reads_what_its_devices_need(
    form: str,
    mesh: Mapping[str, int],
    ending: str,
    read: int,
    store: Bucket,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    url = store.upload(request.getfixturevalue(form))
    loading.open_checkpoint(url)
    opened = store.bytes_of(".safetensors")
    store.reads.clear()
    only_the_first_device(monkeypatch)
    load(url, mesh, ending)
    assert store.bytes_of(".safetensors") - opened == read


def test_a_host_reads_the_experts_of_its_devices(
    fp8: Path, store: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = store.upload(fp8)
    source = loading.open_checkpoint(url)
    own = [
        info.end - info.start
        for name, info in loading.fp8.raw_of(source).tensors.items()
        if re.search(r"\.experts\.[01]\.up_proj\.weight", name)
    ]
    opened = store.bytes_of(".safetensors")
    store.reads.clear()
    only_the_first_device(monkeypatch)
    _, leaf = load(url, {"fsdp": 1, "expert": 8}, ".experts.up_proj.weight")
    assert leaf.shape[1] == 16 and len(own) == 2 * 2 * leaf.shape[0]  # bytes and their scales
    assert store.bytes_of(".safetensors") - opened == sum(own)


@pytest.mark.parametrize("piece", [2**26, 1000], ids=["whole", "pieces"])
def test_devices_of_a_host_share_what_they_read(
    llama: Path, store: Bucket, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arrays, "PIECE_BYTES", piece)
    url = store.upload(llama)
    loading.open_checkpoint(url)
    opened = store.bytes_of(".safetensors")
    store.reads.clear()
    params, leaf = load(url, {"fsdp": 8}, "mlp.up_proj.weight")  # eighths of every row
    assert store.bytes_of(".safetensors") - opened == leaf.count * 4
    pieces = [end - start for _, start, end in store.reads if start > 0]
    assert max(pieces) <= piece and sum(pieces) == leaf.count * 4
    assert len(params) == 1


def test_a_merged_save_reads_the_rest_from_the_bucket(
    llama: Path, store: Bucket, tmp_path: Path
) -> None:
    model = dsjax.load_pretrained(store.upload(llama))
    dsjax.save_pretrained(model, str(tmp_path / "out"))
    written = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert written == {file.name: file.read_bytes() for file in llama.iterdir()}


def test_an_adapter_in_the_bucket(llama: Path, store: Bucket, tmp_path: Path) -> None:
    ids = jax.numpy.asarray(tiny.random_ids(190, length=8))
    start = str(tmp_path / "adapter")
    random_adapter(tmp_path / "adapter")
    here = dsjax.load_pretrained(str(llama), adapter=start, dtype="float32")(ids)
    url = store.upload(tmp_path / "adapter", "bucket/adapter")
    model = dsjax.load_pretrained(str(llama), adapter=url, dtype="float32")
    np.testing.assert_array_equal(np.asarray(model(ids)), np.asarray(here))
    plain = dsjax.load_pretrained(str(llama), dtype="float32")(ids)
    assert np.abs(np.asarray(plain) - np.asarray(here)).max() > 0.01

    store.upload(llama)
    with pytest.raises(ConfigError, match="adapter.path: got memory://bucket/model without adapt"):
        dsjax.load_pretrained(str(llama), adapter="memory://bucket/model")
    with pytest.raises(ConfigError, match="adapter.path: got 'memory://bucket/none', expected a"):
        dsjax.load_pretrained(str(llama), adapter="memory://bucket/none")


def random_adapter(folder: Path) -> None:
    """A LoRA on the q projections, as PEFT saves it."""
    from safetensors.torch import save_file

    folder.mkdir()
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_{side}.weight": torch.randn(
            shape, generator=generator
        )
        for layer in range(2)
        for side, shape in (("A", (2, 48)), ("B", (48, 2)))
    }
    save_file(tensors, folder / "adapter_model.safetensors")


def refusal(url: str, revision: str | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        loading.open_checkpoint(url, revision)
    return str(caught.value)


def test_a_folder_without_a_model(store: Bucket, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    assert refusal(store.upload(tmp_path)) == (
        "model.path: got 'memory://bucket/model', expected a model directory with config.json; "
        "it holds a PEFT adapter, give its path as adapter.path"
    )
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "dsjax_checkpoint.json").write_text("{}")
    assert refusal(store.upload(tmp_path)) == (
        "model.path: got memory://bucket/model, which to-flax wrote, expected a Hugging Face "
        "checkpoint behind a URL; copy the folder to this machine"
    )


def test_faults_of_files_name_their_urls(llama: Path, store: Bucket) -> None:
    url = store.upload(llama)
    shard = sorted(file.name for file in llama.glob("*.safetensors"))[0]
    system = memory_bucket.MemoryFileSystem()
    system.pipe_file(f"/bucket/model/{shard}", b"version https://git-lfs.github.com/spec/v1\n")
    assert refusal(url).startswith(
        f"model.path: got a git-lfs pointer in {url}/{shard}, expected the file itself"
    )
    system.rm(f"/bucket/model/{shard}")
    assert refusal(url).startswith(f"model.path: got {url} without {shard}, expected the 4 files")


def test_torch_files_are_refused(store: Bucket, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    torch.save({"a": torch.zeros(2)}, tmp_path / "pytorch_model.bin")
    assert refusal(store.upload(tmp_path)) == (
        "model.path: got memory://bucket/model/pytorch_model.bin, expected safetensors behind a "
        "URL; copy the folder to this machine, or convert it to safetensors"
    )


def test_a_revision_beside_a_url() -> None:
    assert refusal("hf://a/b", "main") == (
        "model.revision: got 'main' with the URL 'hf://a/b', expected null; a revision of the hub "
        "is a part of the URL: hf://organization/name@revision"
    )
