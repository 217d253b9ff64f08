# SPDX-License-Identifier: Apache-2.0
"""What happens when the user's input is wrong, and only that.

In: problems found anywhere in the package, each a line `<field or tensor>: got X, expected Y;
<fix>`; and what the system refuses, as Python and TensorStore tell it. Out: one `ConfigError` with
every line, which an entry point turns into a message on stderr and exit code 2. Failures of our own
stay ordinary exceptions: traceback, exit 1.
"""

import difflib
import errno
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from dsjax import signals

_ELSEWHERE = "use a place that can be written, or have the permission changed"
_FAULTS: Mapping[int, str] = {
    errno.ENOSPC: "free some space there",
    errno.EDQUOT: "free some space there, or ask for a larger quota",
    errno.EFBIG: "lift the limit on the size of a file (ulimit -f), or use a place without one",
    errno.EIO: "see the logs of the disk, or of the file server",
    errno.ESTALE: "mount the file server again",
    errno.ENOTCONN: "mount the bucket or the file server again",
    errno.EROFS: _ELSEWHERE,
    errno.EACCES: _ELSEWHERE,
    errno.EPERM: _ELSEWHERE,
    errno.ENAMETOOLONG: "use a shorter path",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENFILE: "close files, or raise the machine's limit on open ones",
}
"""What a system may refuse to whoever reads or writes a file, and what helps."""

_DISKS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ESTALE, errno.EROFS}
"""Those that tell of files also where they name none; a socket can lack a permission too."""


class ConfigError(ValueError):
    """The configuration, data, checkpoint or adapter is wrong; the message names what and how."""


def printable(name: str) -> str:
    """Somebody's name for something, in one line: escaped where it holds control characters."""
    return name if name.isprintable() else repr(name)


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


def first_line(error: BaseException) -> str:
    """Give an error's type, and the first line of what it says."""
    return f"{type(error).__name__}: {error}".strip().splitlines()[0]


@contextmanager
def renamed(names: Mapping[str, str]) -> Iterator[None]:
    """Tell a block's ConfigErrors under the names that the user typed (`--model`)."""
    try:
        yield
    except ConfigError as error:
        pattern = rf"(?<!\S)({'|'.join(map(re.escape, names))})(?=[:\[, ])"
        raise ConfigError(re.sub(pattern, lambda found: names[found[1]], str(error))) from error


def system_fault(error: BaseException, file: Path | str | None = None) -> ConfigError | None:
    """Word an error that is the system's: no space, a quota, no permission, a bad disk.

    Args:
        error: any; also TensorStore's, which has the system's only in its words.
        file: what was read or written, where the error does not say.

    Returns:
        A ConfigError as it is; None for what is something else.
    """
    if isinstance(error, ConfigError):
        return error
    if isinstance(error, BaseExceptionGroup):
        found = (system_fault(one, file) for one in error.exceptions)
        return next((fault for fault in found if fault is not None), None)
    number, name = None, None
    if isinstance(error, OSError):
        number, name = error.errno, error.filename
    elif told := re.search(r"os_error_code='(\d+)'|\[OS error (\d+)", str(error)):
        files = re.findall(r'"(/[^"]+)"', str(error))  # the last is the file, others hold it
        number, name = int(told[1] or told[2]), files[-1] if files else None
    if number is None or number not in _FAULTS or not (name or number in _DISKS):
        return None if error.__cause__ is None else system_fault(error.__cause__, file)
    return ConfigError(
        f"{os.fsdecode(name or file or 'a file')}: got {os.strerror(number)!r} from the system, "
        f"expected a file that can be read and written; {_FAULTS[number]}, and run the same "
        "command again"
    )


@contextmanager
def files_of(file: Path | str) -> Iterator[None]:
    """Tell what the system refuses in a block as what it refuses of a file, or of files in it.

    Raises:
        ConfigError: no space, a quota, no permission, a bad disk.
    """
    try:
        yield
    except Exception as error:
        fault = system_fault(error, file)
        if fault is None or fault is error:
            raise
        raise fault from error


def run_command(main: Callable[[Sequence[str]], int]) -> None:
    """Run an entry point on the command line's words and exit with its code.

    Or with 2 on a ConfigError and on what the system refuses, with 130 on SIGINT, an interrupt from
    the keyboard, with 143 on SIGTERM (both of which the training loop takes over to save first).
    """
    with signals.sent_to(signals.end), orbax_muted():
        code = _exit_code(main)
    _exit(code)


@contextmanager
def orbax_muted() -> Iterator[None]:
    """Keep what Orbax logs of its own workings off stderr; what matters it raises."""
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def answer_early(answered: Callable[[Sequence[str]], bool]) -> None:
    """Exit, as `run_command` does, where the command line needs no more than `answered`.

    An entry point calls it before its imports, which take seconds: a text is printed, a mistake is
    named (ConfigError, exit code 2); else it returns.
    """
    done = False

    def main(argv: Sequence[str]) -> int:
        nonlocal done
        done = answered(argv)
        return 0

    code = _exit_code(main)
    if done or code:
        _exit(code)


def _exit_code(main: Callable[[Sequence[str]], int]) -> int:
    try:
        with files_of("a file"):
            code = main(sys.argv[1:])
        with files_of("standard output"), suppress(BrokenPipeError):  # who reads has enough
            sys.stdout.flush()
    except ConfigError as error:
        with suppress(OSError):  # it may go to the disk that is full
            print(f"error: {error}", file=sys.stderr)
        code = 2
    return code


def _exit(code: int) -> NoReturn:
    _give_up(sys.stdout)
    _give_up(sys.stderr)
    sys.exit(code)


def _give_up(stream: Any) -> None:
    """Forget what cannot be written: Python would try again at its end, and exit with 120."""
    try:
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
