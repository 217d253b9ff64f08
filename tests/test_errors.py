# SPDX-License-Identifier: Apache-2.0
"""What the system refuses is the user's matter: one message that names the file, exit code 2."""

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dsjax.errors import ConfigError, files_of, system_fault

ROOT = Path(__file__).parents[1]
NUMBERS = ("ENOSPC", "EDQUOT", "EFBIG", "EIO", "EROFS", "EACCES", "EPERM", "EMFILE", "ESTALE")
TENSORSTORE = (
    'RESOURCE_EXHAUSTED: Error writing "opt_state.0/0.0" in OCDBT database at local file '
    '"/r/checkpoints/4/": Failed writing: "/r/checkpoints/4/d/b0955": Failed to write 690068 bytes '
    "to file 20: {text} [{code}]"
)


def caused(error: Exception, cause: BaseException) -> Exception:
    error.__cause__ = cause
    return error


FORMS: dict[str, Callable[[int, str], BaseException]] = {
    "python": lambda number, text: OSError(number, text, "/r/checkpoints/4/d/b0955"),
    "tensorstore": lambda number, text: ValueError(
        TENSORSTORE.format(text=text, code=f"os_error_code='{number}'")
    ),
    "an earlier tensorstore": lambda number, text: ValueError(
        TENSORSTORE.format(text="", code=f"OS error {number}: {text}")
    ),
    "a cause": lambda number, text: caused(
        RuntimeError("save failed"), OSError(number, text, "/r/checkpoints/4/d/b0955")
    ),
    "a group": lambda number, text: BaseExceptionGroup(
        "threads", [KeyError("x"), OSError(number, text, b"/r/checkpoints/4/d/b0955")]
    ),
}


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("form", FORMS)
def test_the_file_is_named(name: str, form: str):
    number = getattr(errno, name)
    text = os.strerror(number)
    fault = system_fault(FORMS[form](number, text))
    assert isinstance(fault, ConfigError)
    assert str(fault).startswith(
        f"/r/checkpoints/4/d/b0955: got '{text}' from the system, expected"
    )
    assert "; " in str(fault) and "\n" not in str(fault)


@pytest.mark.parametrize("name", ["ENOSPC", "EDQUOT", "EFBIG", "EIO", "EROFS", "ESTALE"])
def test_what_names_no_file_is_told_of_the_one_that_is_written(name: str):
    number = getattr(errno, name)
    with (
        pytest.raises(ConfigError, match="^runs/metrics.jsonl: got "),
        files_of("runs/metrics.jsonl"),
    ):
        raise OSError(number, os.strerror(number))


@pytest.mark.parametrize(
    "error",
    [
        ConfigError("data: got x, expected y"),
        KeyError("x"),
        OSError("the disk is gone"),
        OSError(errno.ENOENT, "No such file or directory", "a"),
        PermissionError(errno.EACCES, "Permission denied"),  # of a socket
        ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"),
        caused(ConfigError("data: got x, expected y"), OSError(errno.EACCES, "", "a")),
    ],
)
def test_all_else_stays_what_it_is(error: Exception):
    with pytest.raises(type(error)) as raised, files_of("a"):
        raise error
    assert raised.value is error


COMMAND = """
import sys
from dsjax.errors import run_command
def main(words):
    print(int(words[0]) * "x")
    print("said", file=sys.stderr)
    return 0
run_command(main)
"""


@pytest.mark.parametrize("full", ["stdout", "stderr"])
@pytest.mark.parametrize("length", [1, 100_000])
def test_a_full_disk_behind_the_output(full: str, length: int):
    """Python itself would end with 120 for what it cannot write at its end."""
    words = [sys.executable, "-c", COMMAND, str(length)]
    streams: dict[str, Any] = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with open("/dev/full", "w") as disk:
        streams[full] = disk
        done = subprocess.run(words, **streams, text=True, env=environment)
    assert done.returncode == 2
    if full == "stdout":
        assert "error: " in done.stderr and "No space left on device" in done.stderr
        assert "Traceback" not in done.stderr and "Exception" not in done.stderr
