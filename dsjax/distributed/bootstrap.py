# SPDX-License-Identifier: Apache-2.0
"""How the processes of a run find each other, before jax connects them.

In: `--coordinator HOST:PORT --processes N --process I` of a command line, or the environment that a
launcher made (`launchers`). Out: a `ProcessSpec`, None for a process alone; and after
`wait_for_all` all processes are there. Why wait first: where the coordinator cannot be reached, or
a process never comes, `jax.distributed.initialize` aborts the process without saying which. Not
done here: process 0's side of it (`coordinator`), what they do together (`processes`).
"""

import socket
import time
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

from dsjax.config.train_options import PROCESS_OPTIONS
from dsjax.distributed.coordinator import GRACE, PAUSE, greeting, parse, receive, send
from dsjax.distributed.launchers import WAIT, ProcessSpec, Sign, detect
from dsjax.errors import ConfigError, raise_all

_MOST_BYTES = 2**16


def detect_process(given: Mapping[str, str], environment: Mapping[str, str]) -> ProcessSpec | None:
    """Which process of how many this is; None if it is alone.

    Args:
        given: options of the command line, from `config.train_options`.
        environment: of this process.

    Raises:
        ConfigError: an option is wrong or missing, or the environment tells of several processes
            and not how they meet.
    """
    raise_all(_option_problems(given))
    wait = float(given.get("--wait", WAIT))
    processes = int(given.get("--processes", 0))
    if processes == 1:
        return None
    if "--coordinator" in given:
        return ProcessSpec(given["--coordinator"], processes, int(given["--process"]), None, wait)
    found = detect(environment, wait)
    if isinstance(found, Sign):
        raise ConfigError(
            f"processes: got {found.found}, expected {found.fix}; or --processes 1 for a run of "
            "this process alone"
        )
    return found


def refuse_several(command: str, environment: Mapping[str, str]) -> None:
    """Refuse to run a command of one process where a launcher started several.

    Raises:
        ConfigError: it did.
    """
    found = detect(environment, WAIT)
    if found is None:
        return
    if isinstance(found, Sign):
        several, outside = found.found, f"or by env -u {found.variable}"
    else:
        several, outside = str(found.num_processes), "on a TPU host, with JAX_PLATFORMS=cpu"
    raise ConfigError(
        f"processes: got {several}, expected 1; {command} runs as one process: start it "
        f"on one machine, outside of the launcher ({outside})"
    )


def _option_problems(given: Mapping[str, str]) -> Iterator[str]:
    """Return a line for every option that is wrong or missing."""
    three = PROCESS_OPTIONS[:3]
    some = {name: given[name] for name in three if name in given}
    if some and some != {"--processes": "1"}:  # one alone needs nobody's address
        for name in three:
            if name not in given:
                others = " and ".join(other for other in three if other != name)
                yield f"{name}: got nothing, expected it beside {others}"
    host, _, port = given.get("--coordinator", "host:1").rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        yield (
            f"--coordinator: got {given['--coordinator']!r}, expected HOST:PORT of process 0, "
            "such as 10.0.0.2:8476"
        )
    counts = {name: given.get(name, "0" if name == "--process" else "1") for name in three[1:]}
    for name, least in (("--processes", 1), ("--process", 0)):
        if not counts[name].isdecimal() or int(counts[name]) < least:
            yield f"{name}: got {counts[name]!r}, expected an integer >= {least}"
            return
    if "--process" in given and int(counts["--process"]) >= int(counts["--processes"]):
        most = int(counts["--processes"]) - 1
        yield f"--process: got {counts['--process']}, expected 0 to {most}; they count from 0"
    wait = given.get("--wait", "1")
    if not wait.replace(".", "", 1).isdecimal() or not float(wait):
        yield f"--wait: got {wait!r}, expected seconds"


def wait_for_all(spec: ProcessSpec) -> None:
    """Return once all processes are there.

    Raises:
        ConfigError: they are not, within `spec.wait` seconds, with the same message on all that
            came; or this one is refused, for a number that does not fit.
    """
    if spec.process_id == 0:
        receive(spec.coordinator_address, spec.address[1], spec.num_processes, spec.wait)
    else:
        _connect(spec)


def _connect(spec: ProcessSpec) -> None:
    """As any other process: go to the address until process 0 answers."""
    began, reason = time.monotonic(), "no answer"
    while time.monotonic() - began < spec.wait:
        try:
            with socket.create_connection(spec.address, timeout=GRACE) as connection:
                send(connection, greeting(spec.process_id, spec.num_processes))
                # It answers when all are there, or gives up at the end of its own waiting.
                answer = _read(connection, spec.wait + GRACE)
        except (OSError, UnicodeError) as error:  # the latter of a name that can be no host's
            reason = getattr(error, "strerror", None) or str(error)
            time.sleep(PAUSE)
            continue
        if "problem" in answer and answer["problem"] is None:
            return
        if isinstance(answer.get("problem"), str):
            raise ConfigError(answer["problem"])
        reason = "it did not answer as process 0 of a run"
        time.sleep(PAUSE)
    _unreachable(spec, reason)


def _unreachable(spec: ProcessSpec, reason: str) -> NoReturn:
    raise ConfigError(
        f"--coordinator: got {spec.coordinator_address}, where process {spec.process_id} did not "
        f"reach process 0 within {spec.wait:g} s ({reason}), expected the address of process 0; "
        "see its console, and whether the network lets this port through"
    )


def _read(connection: socket.socket, seconds: float) -> dict[str, Any]:
    """One message; empty if none came in time, or something else."""
    data, deadline = b"", time.monotonic() + seconds
    try:
        while not data.endswith(b"\n") and len(data) < _MOST_BYTES:
            connection.settimeout(max(deadline - time.monotonic(), 0.001))
            more = connection.recv(4096)
            if not more:
                break
            data += more
    except OSError:
        return {}
    return parse(data)
