# SPDX-License-Identifier: Apache-2.0
"""What is used of jax and is not public is there, in the form in which it is used."""

import inspect

import pytest
from jax._src.lib import _jax

from dsjax.distributed.jax_internals import coordinator_client, known_clusters
from dsjax.distributed.processes import Store

KNOWN = {"GceTpuCluster", "GkeTpuCluster", "K8sCluster", "OmpiCluster", "SlurmCluster"}
"""Those that `launchers` treats by name, or that the documents promise."""


def test_jax_knows_these_launchers() -> None:
    assert {cluster.__name__ for cluster in known_clusters()} >= KNOWN


@pytest.mark.parametrize("cluster", known_clusters(), ids=lambda cluster: cluster.__name__)
def test_a_launcher_is_asked_as_jax_asks_it(cluster: type) -> None:
    assert isinstance(cluster.name, str) and isinstance(cluster.opt_in_only_method, bool)
    inspect.signature(cluster.get_coordinator_address).bind(45, "1234")
    for ask in ("is_env_present", "get_process_count", "get_process_id", "get_local_process_id"):
        inspect.signature(getattr(cluster, ask)).bind()


def test_the_coordinator_s_client_is_a_store() -> None:
    client = _jax.DistributedRuntimeClient
    wanted = [name for name in vars(Store) if name.startswith(("key_", "blocking_"))]
    assert len(wanted) == 3
    assert [name for name in wanted if not callable(getattr(client, name, None))] == []
    assert callable(client.key_value_dir_get_bytes)  # tests/hosts/late.py looks at the addresses
    assert "allow_overwrite" in (client.key_value_set.__doc__ or "")


def test_a_process_alone_has_no_client() -> None:
    assert coordinator_client() is None
