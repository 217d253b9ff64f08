# SPDX-License-Identifier: Apache-2.0
"""An adapter as PEFT saves it.

In: the trained arrays. Out: `adapter_config.json` and `adapter_model.safetensors`, read again and
found the same. Not done here: names and fields of PEFT's files (`adapters.lora_peft`, `prefix`).
"""

import json
from pathlib import Path

import numpy as np

from dsjax import adapters
from dsjax.config import AdapterSection
from dsjax.distributed.arrays import host_array
from dsjax.distributed.sharding import Params
from dsjax.training.setup import Assembly
from dsjax.weights import peft
from dsjax.weights.adapter import peft_tensors, resolve
from dsjax.weights.hf_directory import SafetensorsWriter


def write_peft(directory: Path, setup: Assembly, trained: Params, primary: bool = True) -> None:
    """Write PEFT's adapter folder, and prove that it reads back as the same adapter.

    Of several processes the `primary` one writes; the others help it to the arrays.

    Raises:
        RuntimeError: it does not.
    """
    model, spec = setup.model, setup.spec
    assert spec is not None
    gathered = {path: host_array(array, primary) for path, array in trained.items()}
    if not primary:
        return
    host = {path: array for path, array in gathered.items() if array is not None}
    config = adapters.peft_config(model, spec, base_name(setup))
    text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False)
    (directory / peft.CONFIG).write_text(text + "\n", "utf-8")
    tensors = peft_tensors(model, spec, host)
    entries = [(name, array.dtype, array.shape) for name, array in sorted(tensors.items())]
    with SafetensorsWriter(directory / peft.TENSORS, entries) as writer:
        for name, _, _ in entries:
            writer.append(name, tensors[name])
    again = resolve(AdapterSection(path=str(directory)))
    assert again is not None
    read = peft.read_tensors(str(directory))
    wrong = sorted(tensors.keys() ^ read.keys())
    wrong += [n for n in tensors.keys() & read.keys() if not np.array_equal(tensors[n], read[n])]
    if wrong or adapters.peft_config(model, again, base_name(setup)) != config:
        raise RuntimeError(f"{directory}: the adapter read back differs from the trained: {wrong}")


def base_name(setup: Assembly) -> str:
    """Return what an adapter's config names as its base: the model's path as the user gave it."""
    return setup.section.path
