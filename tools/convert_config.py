# SPDX-License-Identifier: Apache-2.0
"""Convert a configuration of LLaMA-Factory or TRL to ours: `dsjax convert-config` from a checkout.

    python tools/convert_config.py FILE.yaml --devices N [--dataset-info FILE.json] > ours.yaml

In: their YAML. Out: ours on stdout. Not done here: anything else than finding the package
(`dsjax.config.convert_config`).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dsjax.config.convert_config import main as main
from dsjax.errors import run_command

if __name__ == "__main__":
    run_command(main)
