# SPDX-License-Identifier: Apache-2.0
"""View: curves, evaluations and configuration of runs, as one page for a browser.

    python -m dsjax.view RUN [RUN ...] [--out FILE] [--no-browser]

In: the folders of runs, at work or done. Out: the page as they are now; its path on stdout. Not
done here: reading a run (`snapshot`), the page (`page`).
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path, PurePath

from dsjax.config.command_line import CommandParser
from dsjax.config.paths import is_url, written_to_url
from dsjax.errors import ConfigError, printable
from dsjax.training.run_dir import RunDir
from dsjax.training.working_copy import fetched
from dsjax.view.page import to_html
from dsjax.view.snapshot import read_snapshot
from dsjax.weights.folders import write_atomic

USAGE = """View: curves, evaluations and configuration of runs, as one page for a browser.

    python -m dsjax.view RUN [RUN ...] [--out FILE] [--no-browser]

The page is one file, needs no network, and shows the runs as they were when it was made. Of several
runs it lays the curves over each other, and lists what differs between their configurations. stdout
has the page's path; a browser opens it where there is a display.
"""


def make_parser() -> CommandParser:
    """Declare the options; `--help` prints them."""
    parser = CommandParser("python -m dsjax.view", USAGE)
    add = parser.add_argument
    add("runs", metavar="RUN", nargs="+", help="output_dir of a run")
    add(
        "--out",
        metavar="FILE",
        help="page to write (view.html in the first RUN; of one in a bucket dsjax-NAME.html here)",
    )
    add("--no-browser", action="store_true", help="write the page, and do not open it")
    return parser


def main(argv: Sequence[str]) -> int:
    """Write the page of the runs that the command line names, and show it."""
    words = make_parser().parse_args(argv)
    if words.out is not None:
        check_out(words.out)
    runs = [RunDir.at(path) for path in words.runs]
    names = short_names(words.runs)
    with ExitStack() as held:
        for run in runs:
            held.enter_context(fetched(run))
        snapshots = [read_snapshot(run, name) for run, name in zip(runs, names, strict=True)]
    out = page_of(runs[0]) if words.out is None else Path(words.out)
    write_atomic(out, to_html(snapshots, datetime.now().astimezone()))
    print(printable(str(out)))
    if not words.no_browser and has_display():
        show(out)
    return 0


def short_names(paths: Sequence[str]) -> list[str]:
    """Name runs by their folders alone, or by the paths as given where two would be the same.

    Raises:
        ConfigError: a run is given twice.
    """
    places = [PurePath(path) if is_url(path) else Path(path).resolve() for path in paths]
    twice = [path for path, place in zip(paths, places, strict=True) if places.count(place) > 1]
    if twice:
        raise ConfigError(f"RUN: got {' and '.join(twice)}, which are one, expected each run once")
    names = [place.name for place in places]
    return names if len(set(names)) == len(names) else list(paths)


def page_of(run: RunDir) -> Path:
    """Where the page of a run goes: into its folder, or here for one in a bucket."""
    return Path(f"dsjax-{run.name}.html") if run.url else run.view


def check_out(path: str) -> None:
    """Refuse what no page can be written to.

    Raises:
        ConfigError: a URL, a folder, or a file in a folder that is not there.
    """
    if is_url(path):
        raise ConfigError(written_to_url(path, "--out"))
    out = Path(path)
    if out.is_dir():
        raise ConfigError(f"--out: got the folder {path!r}, expected a file; name one in it")
    if not out.parent.is_dir():
        raise ConfigError(
            f"--out: got {path!r}, expected a file in a folder that is there; make "
            f"{str(out.parent)!r}, or name another"
        )


def has_display() -> bool:
    """Whether a browser has somewhere to show a page."""
    shown = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    return bool(shown) or sys.platform == "darwin"


def show(page: Path) -> None:
    """Open a page in the user's browser, by a process of its own that nobody waits for."""
    subprocess.Popen(
        [sys.executable, "-m", "webbrowser", page.resolve().as_uri()],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
