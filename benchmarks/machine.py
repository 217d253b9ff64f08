# SPDX-License-Identifier: Apache-2.0
"""Where a measurement was taken, and how the memory of a process is measured.

In: nothing but the machine. Out: its description for a result file, and the peak of this process's
memory between two points. Not done here: what is measured.
"""

import gc
import os
import platform
import resource
import threading
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

LIBRARIES = ("jax", "flax", "optax", "orbax-checkpoint", "torch", "transformers", "peft", "numpy")
STATUS = Path("/proc/self/status")


def describe() -> dict[str, Any]:
    """Processor, cores, memory, system and library versions."""
    cpu = [line for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    memory = [line for line in _lines("/proc/meminfo") if line.startswith("MemTotal")]
    return {
        "cpu": cpu[0].partition(":")[2].strip() if cpu else platform.processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(int(memory[0].split()[1]) / 2**20, 1) if memory else None,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "load_at_start": round(os.getloadavg()[0], 1),
        "versions": {name: _version(name) for name in LIBRARIES},
    }


def _lines(path: str) -> list[str]:
    file = Path(path)
    return file.read_text().splitlines() if file.is_file() else []


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def resident_bytes() -> int:
    """Memory of this process that is in RAM now (VmRSS): the page cache is not part of it."""
    return _status("VmRSS")


def _status(key: str) -> int:
    for line in STATUS.read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


class PeakMemory:
    """The highest resident memory of this process while the block runs, sampled by a thread.

    Attributes:
        before: bytes when the block was entered.
        peak: highest sample, in bytes.
        process_peak: highest of the process's life until the end of the block (ru_maxrss), which
            no short peak escapes, and which also holds what came before the block.
        seconds: how long the block ran.
        cpu_seconds: processor time that this process took for it, of all its threads.
    """

    def __init__(self, interval: float = 0.005):
        self._interval, self._stop = interval, threading.Event()
        self.before = self.peak = self.process_peak = 0
        self.seconds = self.cpu_seconds = 0.0

    def __enter__(self) -> "PeakMemory":
        gc.collect()
        self.before = self.peak = resident_bytes()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        self._began, self._cpu_began = time.perf_counter(), time.process_time()
        return self

    def _sample(self) -> None:
        while not self._stop.wait(self._interval):
            self.peak = max(self.peak, resident_bytes())

    def __exit__(self, *error: object) -> None:
        self.seconds = time.perf_counter() - self._began
        self.cpu_seconds = time.process_time() - self._cpu_began
        self._stop.set()
        self._thread.join()
        self.peak = max(self.peak, resident_bytes())
        self.process_peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
