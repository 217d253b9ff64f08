# SPDX-License-Identifier: Apache-2.0
"""What happens when the user's input is wrong, and only that.

In: problems found anywhere in the package, each a line `<field or tensor>: got X, expected Y;
<fix>`. Out: one `ConfigError` with every line, which an entry point turns into a message on stderr
and exit code 2. Failures of our own stay ordinary exceptions: traceback, exit 1.
"""

import difflib
import logging
import re
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager


class ConfigError(ValueError):
    """The configuration, data, checkpoint or adapter is wrong; the message names what and how."""


def raise_all(problems: Iterable[str]) -> None:
    """Raise one ConfigError that holds every problem; return if there is none."""
    lines = list(problems)
    if lines:
        raise ConfigError("\n".join(lines))


def nearest(name: str, candidates: Iterable[str], most: int = 8) -> str:
    """Say which candidates could have been meant: the nearest ones, else the first few."""
    known = sorted(set(candidates))
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if close:
        return f"did you mean {' or '.join(close)}?"
    more = f", ... ({len(known)} in all)" if len(known) > most else ""
    return f"known: {', '.join(known[:most])}{more}"


@contextmanager
def renamed(names: Mapping[str, str]) -> Iterator[None]:
    """Tell a block's ConfigErrors under the names that the user typed (`--model`)."""
    try:
        yield
    except ConfigError as error:
        pattern = rf"(?<!\S)({'|'.join(map(re.escape, names))})(?=[:\[, ])"
        raise ConfigError(re.sub(pattern, lambda found: names[found[1]], str(error))) from error


def run_command(main: Callable[[Sequence[str]], int]) -> None:
    """Run an entry point on the command line's words and exit with its code.

    Or with 2 on a ConfigError, with 130 on an interrupt from the keyboard, with 143 on SIGTERM
    (which the training loop takes over to save first).
    """
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax warns of its own workings
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        code = main(sys.argv[1:])
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)
