# SPDX-License-Identifier: Apache-2.0
"""All that is used of jax and is not public: a new jax that changes it fails one test first.

In: nothing. Out: jax's launchers, its client of the coordinator, and its calls of cuDNN. Each holds
as a test (`tests/distributed/test_jax_internals.py`, `tests/models/ops/test_attention_cudnn.py`)
says from jax 0.10, the oldest that is supported. Not done here: what is made of them (`launchers`,
`processes`, `models/ops/attention_cudnn`).
"""

import importlib
from types import ModuleType
from typing import Any

from jax._src.clusters import ClusterEnv
from jax._src.distributed import global_state

__all__ = ["ClusterEnv", "coordinator_client", "cudnn_attention", "known_clusters"]


def known_clusters() -> list[type[ClusterEnv]]:
    """List the launchers that jax knows, in the order in which it looks for them.

    Private, since `jax.distributed.initialize` looks for them by itself, and connects at once: how
    many processes there are has to be known before, to wait for those that are late.
    """
    return list(ClusterEnv._cluster_types)


def coordinator_client() -> Any:
    """Return this process's client of jax's coordinator, None before `initialize`.

    Private, since jax offers no key-value store; Orbax and others take it from the same place.
    """
    return global_state.client


def cudnn_attention() -> ModuleType:
    """Return jax's module of cuDNN's attention, imported only where that attention is asked for.

    Private, since the public function wants values as wide as keys, and the private one above the
    module's primitives asks the default device what it can do, which need not be the one to compile
    for, and places packed values by the keys' strides, of the queries' number of heads before 0.11.
    """
    return importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
