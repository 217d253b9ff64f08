# SPDX-License-Identifier: Apache-2.0
"""An object store of the test's own, and no waiting between tries."""

from pathlib import Path

import object_store
import pytest

from dsjax.buckets import Bucket, retry


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """An empty folder of a bucket."""
    object_store.register(tmp_path / "store")
    (tmp_path / "store").mkdir()
    monkeypatch.setattr(retry, "DELAYS", (0.0,) * 5)
    return Bucket.open("store://bucket/run", "output_dir")
