# SPDX-License-Identifier: Apache-2.0
"""A prefix starts and is written as PEFT's: one tensor over layer, key or value, head and size."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_steps

from dsjax import adapters
from dsjax.adapters import prefix
from dsjax.adapters.prefix import PREFIX_TUNING, PrefixConfig
from dsjax.config import MeshSection
from dsjax.distributed.mesh import make_mesh
from dsjax.distributed.sharding import leaf_shardings
from dsjax.errors import ConfigError
from dsjax.models import MODELS
from dsjax.models.llama.model import prefix_shape
from dsjax.training.partition import make_partition


def _initial(**mesh: int) -> dict[str, np.ndarray]:
    model = tiny_steps.model_of(num_hidden_layers=3)
    spec = PrefixConfig(64)
    adapters.attach(model, spec)
    leaves = make_partition(model).leaves
    section = MeshSection(**mesh)
    devices = jax.devices()[: section.data * section.fsdp * section.tensor]
    shardings = leaf_shardings(leaves, make_mesh(section, devices))
    params = adapters.initial_params(model, spec, leaves, shardings, seed=3, loaded={})
    return {path: np.asarray(array) for path, array in params.items()}


def test_the_start_is_a_standard_normal_on_every_mesh() -> None:
    one, many = _initial(fsdp=1), _initial(fsdp=2, tensor=2, data=2)
    assert {path: array.tobytes() for path, array in one.items()} == {
        path: array.tobytes() for path, array in many.items()
    }
    values = np.concatenate([array.ravel() for array in one.values()])
    assert len(set(values)) > 0.99 * values.size  # keys, values and layers are drawn apart
    # 6,144 draws: standard deviations of the mean 0.013, of the spread 0.009.
    assert abs(values.mean()) < 0.05 and abs(values.std() - 1) < 0.04


def test_the_file_holds_key_and_value_of_every_layer_by_token() -> None:
    model = tiny_steps.model_of(num_hidden_layers=3)
    values = np.arange(5 * 3 * 2 * 2 * 8, dtype=np.float32).reshape(5, -1)

    key, value = prefix.from_file(values, model)

    assert key.shape == value.shape == (3, 5, 2, 8)
    by_place = values.reshape(5, 3, 2, 2, 8)  # token, layer, key or value, head, size: PEFT's view
    for layer in range(3):
        np.testing.assert_array_equal(key[layer], by_place[:, layer, 0])
        np.testing.assert_array_equal(value[layer], by_place[:, layer, 1])
    at = "model.layers.self_attn.prefix"
    params = {f"{at}.key": jax.numpy.asarray(key), f"{at}.value": jax.numpy.asarray(value)}
    written = PREFIX_TUNING.to_file(model, PrefixConfig(5), params)
    assert list(written) == ["prompt_embeddings"]
    np.testing.assert_array_equal(written["prompt_embeddings"], values)


def test_the_config_says_the_shape() -> None:
    model = tiny_steps.model_of(num_hidden_layers=3, num_key_value_heads=1)
    fields = prefix.config_fields(model, PrefixConfig(7))
    expected = {"num_virtual_tokens": 7, "num_layers": 3, "num_attention_heads": 1, "token_dim": 8}
    assert fields.items() >= expected.items()


TWO_STACKS = {
    "model_type": "deepseek",
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
}
"""A dense layer and two with experts, whose attention keeps plain keys and values."""

STACKS = ("model.dense_layers.self_attn.prefix", "model.layers.self_attn.prefix")


@pytest.fixture
def two_stacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A family of several stacks that has a prefix: none of those that PEFT knows is."""
    monkeypatch.setitem(MODELS, "deepseek", replace(MODELS["deepseek"], prefix=prefix_shape))


@pytest.mark.usefixtures("two_stacks")
def test_every_stack_has_a_prefix_and_the_file_holds_them_in_the_layers_order() -> None:
    model, config = tiny_steps.model_of(**TWO_STACKS), PrefixConfig(5)
    adapters.attach(model, config)
    leaves = make_partition(model).leaves
    (shape,) = PREFIX_TUNING.shapes(model, config, leaves).values()
    values = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)

    params = PREFIX_TUNING.from_file(model, config, leaves, {"prompt_embeddings": values})

    adapter = {path: leaf.shape for path, leaf in leaves.items() if leaf.kind == "adapter"}
    assert {path: array.shape for path, array in params.items()} == adapter
    for kind in ("key", "value"):
        whole = np.concatenate([params[f"{path}.{kind}"] for path in STACKS])
        by_place = values.reshape(5, 3, 2, 2, 8)[:, :, int(kind == "value")]
        np.testing.assert_array_equal(whole, by_place.swapaxes(0, 1))
    written = PREFIX_TUNING.to_file(model, config, params)
    np.testing.assert_array_equal(written["prompt_embeddings"], values)


@pytest.mark.usefixtures("two_stacks")
def test_the_prefix_of_every_stack_is_seen_with_and_without_a_cache() -> None:
    run = tiny_steps.start(TWO_STACKS, PrefixConfig(2))
    model = tiny_steps.full_model(run)
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 64, (2, 9)), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(9, dtype=jnp.int32), (2, 9))
    expected = model(ids)

    cache, parts = model.init_cache(2, 12), []
    for first, last in [(0, 8), (8, 9)]:
        hidden, cache, _ = model.hidden(ids[:, first:last], positions[:, first:last], cache=cache)
        parts.append(model.head(hidden))

    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), expected, atol=1e-5)
    for attention in model.model.attentions().values():
        value = attention.prefix.value
        attention.prefix.value = value.replace(value[...] + 1)
        changed = model(ids)
        assert np.abs(np.asarray(changed - expected)).max() > 1e-3
        expected = changed


def test_an_attention_over_latents_is_refused() -> None:
    message = (
        "adapter.peft_type: got PREFIX_TUNING for model_type deepseek_v3, expected LORA, IA3 or "
        "null; PEFT's prefix works with llama, qwen2, qwen3 only"
    )
    with pytest.raises(ConfigError, match=message):
        adapters.attach(tiny_steps.model_of(**tiny_steps.V3), PrefixConfig(2))
