# SPDX-License-Identifier: Apache-2.0
"""Convert checkpoints between Hugging Face's form and dsjax's: `dsjax convert` from a checkout.

    python tools/convert_weights.py to-flax SRC DST
    python tools/convert_weights.py to-hf SRC DST

In: SRC. Out: DST. Not done here: anything else than finding the package (`dsjax.export.convert`).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if __name__ == "__main__":
    from dsjax.signals import end_at_once

    end_at_once()  # what `main` imports takes seconds

from dsjax.errors import run_command
from dsjax.export.convert import main as main

if __name__ == "__main__":
    run_command(main)
