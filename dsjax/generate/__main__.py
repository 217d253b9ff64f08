# SPDX-License-Identifier: Apache-2.0
"""python -m dsjax.generate."""

from dsjax.signals import end_at_once

end_at_once()  # what is imported below takes seconds

from dsjax.errors import run_command  # noqa: E402
from dsjax.generate.command import main  # noqa: E402

if __name__ == "__main__":
    run_command(main)
