# SPDX-License-Identifier: Apache-2.0
"""When a folder holds an export that is asked for again."""

import json
from pathlib import Path
from typing import Any

import pytest

from dsjax.export.folder import is_exported, write_manifest
from dsjax.training.run_dir import MANIFEST


@pytest.mark.parametrize(
    ("kept", "least", "there"),
    [
        (0.95, 0.9, True),
        (0.5, 0.9, False),
        (-0.2, 0.0, False),
        (0.5, None, True),
        (None, 0.9, True),
        ("much", 0.9, False),
        ([1.0], None, False),
    ],
)
def test_an_export_is_there_if_it_keeps_what_is_asked_for(
    tmp_path: Path, kept: Any, least: float | None, there: bool
) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    write_manifest(tmp_path, {"run": "this"})
    marker = json.loads((tmp_path / MANIFEST).read_text())
    (tmp_path / MANIFEST).write_text(json.dumps({**marker, "kept": kept}))
    assert is_exported(tmp_path, {"run": "this"}, least) == there
    assert not is_exported(tmp_path, {"run": "another"}, least)
