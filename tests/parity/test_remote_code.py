# SPDX-License-Identifier: Apache-2.0
"""Exports of models whose `config.json` names code open in transformers, and give our logits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import deepseek_moe
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from transformers import AutoModelForCausalLM

import dsjax
from dsjax.weights.hf_directory import open_source
from dsjax.weights.write import write_checkpoint

pytestmark = pytest.mark.parity

AUTO_MAP = {
    "AutoConfig": "configuration_deepseek.DeepseekConfig",
    "AutoModelForCausalLM": "modeling_deepseek.DeepseekForCausalLM",
}


def name_code(folder: Path, code: dict[str, str]) -> None:
    """Add what a repository of the hub has: Python files, and their mention."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"auto_map": AUTO_MAP}))
    for name, text in code.items():
        (folder / name).write_text(text)


def exported(folder: Path, out: Path) -> Path:
    """A merged export of a folder, which then is not there any more."""
    out.mkdir()
    write_checkpoint(open_source(folder), out, {})
    folder.rename(folder.with_name("elsewhere"))
    return out


def our_logits(folder: Path, ids: np.ndarray) -> np.ndarray:
    return np.asarray(dsjax.load_pretrained(str(folder), dtype="float32")(jnp.asarray(ids)))


def test_with_and_without_trust_where_transformers_has_the_class(tmp_path: Path) -> None:
    """The code of V3's repository does not run with transformers 5, and so it must not be asked."""
    source = tiny.build_checkpoint(tmp_path / "model", "deepseek_v3")
    code = "raise RuntimeError('written for transformers 4')\n"
    name_code(source, {"configuration_deepseek.py": code, "modeling_deepseek.py": code})
    ids = tiny.random_ids(288)
    ours = our_logits(source, ids)
    out = exported(source, tmp_path / "out")
    for trust in (True, False):
        model = AutoModelForCausalLM.from_pretrained(
            out, trust_remote_code=trust, dtype="float32", attn_implementation="eager"
        )
        np.testing.assert_allclose(tiny.logits(model.eval(), ids), ours, rtol=0, atol=1e-4)


OPEN = """
import sys
import numpy as np
import torch
from transformers import AutoModelForCausalLM

folder, ids, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(
    folder, trust_remote_code=True, dtype="float32", attn_implementation="eager"
)
assert type(model).__module__.startswith("transformers_modules."), type(model)
with torch.no_grad():
    np.save(out, model.eval()(torch.as_tensor(np.load(ids)).long(), use_cache=False).logits.numpy())
"""


@pytest.mark.slow
def test_with_the_copied_code_where_transformers_has_no_class(tmp_path: Path) -> None:
    """In a process that knows the class from the export only; one file is named by another."""
    source = tiny.build_checkpoint(tmp_path / "model", "deepseek_moe_hub")
    layers = Path(deepseek_moe.__file__).read_text().partition("AutoConfig.register(")[0]
    code = {
        "configuration_deepseek.py": "from .layers import DeepseekConfig\n",
        "modeling_deepseek.py": "from .layers import DeepseekForCausalLM\n",
        "layers.py": layers,
        "train.py": "raise SystemExit(3)\n",
    }
    name_code(source, code)
    ids = tiny.random_ids(288)
    ours = our_logits(source, ids)
    out = exported(source, tmp_path / "out")
    assert {path.name for path in out.glob("*.py")} == set(code) - {"train.py"}
    np.save(tmp_path / "ids.npy", ids)
    files = [out, tmp_path / "ids.npy", tmp_path / "theirs.npy"]
    done = subprocess.run(
        [sys.executable, "-c", OPEN, *files],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(np.load(files[-1]), ours, rtol=0, atol=1e-4)
