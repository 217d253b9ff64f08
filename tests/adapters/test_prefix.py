# SPDX-License-Identifier: Apache-2.0
"""A prefix starts and is written as PEFT's: one tensor over layer, key or value, head and size."""

import jax
import numpy as np
import tiny_steps

from dsjax import adapters
from dsjax.adapters import prefix
from dsjax.adapters.prefix import PREFIX_TUNING, PrefixConfig
from dsjax.config import MeshSection
from dsjax.distributed.mesh import make_mesh
from dsjax.distributed.sharding import leaf_shardings
from dsjax.training.partition import make_partition


def _initial(**mesh: int) -> dict[str, np.ndarray]:
    model = tiny_steps.model_of(num_hidden_layers=3)
    spec = PrefixConfig(64)
    adapters.attach(model, spec)
    leaves = make_partition(model).leaves
    section = MeshSection(**mesh)
    devices = jax.devices()[: section.data * section.fsdp * section.tensor]
    shardings = leaf_shardings(leaves, make_mesh(section, devices))
    params = adapters.initial_params(model, spec, leaves, shardings, seed=3)
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
