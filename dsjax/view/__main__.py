# SPDX-License-Identifier: Apache-2.0
"""python -m dsjax.view."""

from dsjax.errors import run_command
from dsjax.view.command import main

if __name__ == "__main__":
    run_command(main)
