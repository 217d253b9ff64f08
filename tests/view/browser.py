# SPDX-License-Identifier: Apache-2.0
"""A headless Chromium, and what it makes of a page.

In: an HTML file. Out: the page once its script has run, as text or as a picture. As a command it
takes the picture of the README: python tests/view/browser.py RUN/view.html docs/view.png
"""

import subprocess
import sys
import tempfile
from pathlib import Path

QUIET = (
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-gpu",
    "--disable-sync",
    "--hide-scrollbars",
    "--no-first-run",
    "--no-sandbox",  # a test may be root, in a container
    "--run-all-compositor-stages-before-draw",  # else parts of a picture may be missing
)


def dump_dom(page: Path) -> str:
    """Return the page's elements as HTML."""
    return _run(page, "--dump-dom", "--window-size=1200,900")


def take_picture(page: Path, picture: Path, width: int, height: int, *flags: str) -> None:
    """Write a PNG of the page's beginning."""
    size = f"--window-size={width},{height}"
    _run(page, f"--screenshot={picture.absolute()}", size, *flags)


def _run(page: Path, *flags: str) -> str:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = ["chromium", "--headless", *QUIET, f"--user-data-dir={profile}"]
        time = "--virtual-time-budget=2000"
        done = subprocess.run(
            [*command, time, *flags, page.absolute().as_uri()],
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert done.returncode == 0, done.stderr
    return done.stdout


if __name__ == "__main__":
    take_picture(Path(sys.argv[1]), Path(sys.argv[2]), 1200, 1380)
