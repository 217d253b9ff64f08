# SPDX-License-Identifier: Apache-2.0
"""python -m dsjax.plan."""

from dsjax.signals import end_at_once

end_at_once()  # what is imported below takes seconds

from dsjax.errors import run_command  # noqa: E402
from dsjax.plan.command import main  # noqa: E402

if __name__ == "__main__":
    run_command(main)
