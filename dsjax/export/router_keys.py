# SPDX-License-Identifier: Apache-2.0
"""How a merged export's config.json names its router.

In: the model, and the folder with the source's config.json. Out: that file, with `topk_method` and
`scoring_func` named where it has them not. transformers 5 knows them by the model type and saves
checkpoints without them; vLLM's DeepSeek-V2 and V3 read them. Not done here: other keys.
"""

import json
from pathlib import Path

from dsjax.config.json_file import read_object
from dsjax.models import Model
from dsjax.weights.model_files import CONFIG

KEYS = ("topk_method", "scoring_func")


def write_router_keys(directory: Path, model: Model) -> None:
    """Name what of the router config.json leaves open; it stays as it is where it says all."""
    router = getattr(model.config, "router", None)
    file = directory / CONFIG
    content = read_object(file, "model.path")
    missing = [key for key in KEYS if content.get(key) is None]
    if router is None or not missing:
        return
    content |= {key: getattr(router, key) for key in missing}
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
