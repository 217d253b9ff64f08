# SPDX-License-Identifier: Apache-2.0
"""docs/adding_a_model.md adds a family: its code, as it stands there, loads, computes and saves."""

import re
import sys
from pathlib import Path
from types import ModuleType

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

import dsjax
from dsjax import models

DOCUMENT = Path(__file__).parents[2] / "docs" / "adding_a_model.md"
BLOCK = re.compile(r"^```python\n# (.*?)\n(.*?)^```$", re.M | re.S)


def _import_as(name: str, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a module of a document's code, as if it were a file of the package."""
    module = ModuleType(name)
    parent, _, attribute = name.rpartition(".")
    if parent not in sys.modules:
        monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(sys.modules[parent], attribute, module, raising=False)
    exec(compile(code, name, "exec"), vars(module))


def test_the_family_of_the_document_loads_computes_and_saves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    *files, (entry, registration), (_, check) = BLOCK.findall(DOCUMENT.read_text("utf-8"))
    assert [file for file, _ in files] == [
        f"dsjax/models/mistral/{name}.py" for name in ("config", "model", "weights")
    ]
    for file, code in files:
        _import_as(file.removesuffix(".py").replace("/", "."), code, monkeypatch)
    assert entry == "dsjax/models/__init__.py"
    monkeypatch.setattr(models, "MODELS", dict(models.MODELS))
    exec(registration, dict(vars(models)))
    torch.manual_seed(0)
    names = {"dsjax": dsjax, "folder": tmp_path, "jnp": jnp, "load_file": load_file, "np": np}
    exec(check, names | {"torch": torch, "transformers": transformers})
