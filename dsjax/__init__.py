# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning of DeepSeek models in JAX and Flax.

Out: `finetune`, `load_pretrained` and `save_pretrained`, each imported on first use, so that
`import dsjax` starts neither JAX nor a device. Commands are modules of their own, such as
`python -m dsjax.train`.
"""

import importlib
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsjax.pretrained import load_pretrained, save_pretrained
    from dsjax.train import finetune

__version__ = "0.1.0"
__all__ = ["__version__", "finetune", "load_pretrained", "save_pretrained"]

_HOMES = {
    "finetune": "dsjax.train",
    "load_pretrained": "dsjax.pretrained",
    "save_pretrained": "dsjax.pretrained",
}

# The first words of transformers where there is no torch, which dsjax does not need. Here, because
# every command comes by before it imports transformers; its other warnings are left alone.
logging.getLogger("transformers").addFilter(
    lambda record: not record.getMessage().startswith("PyTorch was not found")
)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
