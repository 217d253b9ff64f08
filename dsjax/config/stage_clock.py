# SPDX-License-Identifier: Apache-2.0
"""A clock on stderr beside what takes long and cannot speak: an import, a compiler.

In: what is done, in a few words. Out: lines with the time that has passed, ever more seldom; on a
terminal one line, renewed in place and gone at the end. It imports nothing that takes time, since
commands start it before their imports. Not done here: bars and spinners (`training.console`).
"""

import sys
import threading
import time
from itertools import chain, repeat

PAUSES = (2.0, 2.0, 2.0, 2.0, 2.0, 10.0, 20.0, 30.0)
"""Seconds between two lines of what takes long; the last of them for ever after."""

RENEWED = 0.5
"""Seconds after which a terminal's line is written anew."""


class StageClock:
    """Says what is done and for how long, from a thread of its own; a context manager.

    Args:
        text: what is done.
        at_once: whether the first line comes at the start, not only where it takes longer.
        in_place: whether stderr is a terminal, where the line is written over.
    """

    def __init__(self, text: str, at_once: bool = True, in_place: bool = False) -> None:
        self._text, self._far, self._at_once, self._in_place = text, "", at_once, in_place
        self._began, self._ended = time.monotonic(), threading.Event()
        self._thread = threading.Thread(target=self._say, name=text, daemon=True)

    def tell(self, far: str) -> None:
        """Take how far it is; the next line says so."""
        self._far = f": {far}"

    def start(self) -> "StageClock":
        """Begin to say so."""
        if self._at_once:
            print(self._text, file=sys.stderr, flush=True)
        self._thread.start()
        return self

    def stop(self) -> None:
        """Say no more; nothing is left of it on a terminal."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def _say(self) -> None:
        pauses = repeat(RENEWED) if self._in_place else chain(PAUSES, repeat(PAUSES[-1]))
        width = 0
        for pause in pauses:
            if self._ended.wait(pause):
                break
            line = f"{self._text}{self._far} ({clock(time.monotonic() - self._began)})"
            # Spaces, not control characters: any terminal knows them.
            shown = f"\r{line:<{width}}" if self._in_place else f"{line}\n"
            print(shown, end="", file=sys.stderr, flush=True)
            width = len(line)
        if self._in_place and width:
            print(f"\r{' ' * width}\r", end="", file=sys.stderr, flush=True)

    def __enter__(self) -> "StageClock":
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()


def import_clock(libraries: str) -> StageClock:
    """Make the clock beside the imports of a command, whose first line has just been printed."""
    return StageClock(f"importing {libraries}", at_once=False, in_place=sys.stderr.isatty())


def clock(seconds: float) -> str:
    """Write seconds as hours, minutes and seconds: 1:02:03."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"
