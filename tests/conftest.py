# SPDX-License-Identifier: Apache-2.0
"""The machine that tests run on: eight simulated CPU devices, no network, one compile cache.

Every function of the package is checked against its annotations while tests run. A test marked
with a need (`NEEDS`) is left out where it is not met, and the last lines say how many were.
"""

import gc
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import hypothesis
import jaxtyping
import our_warnings
import pytest

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache" / "jax"
CACHE_BYTES = 2 * 2**30

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",  # torch and BLAS; the test processes share the cores
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",  # else the CUDA compiler asks for a driver
    "JAX_COMPILATION_CACHE_DIR": str(CACHE),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    # XLA lets a device's independent collectives run at once, and each holds a thread of one pool
    # until all devices have come to it. With few threads, those of some devices may hold all, and
    # the others never come. NPROC is how XLA is told the size of that pool.
    "NPROC": "256",
    # Compiling is most of the tests' work, and of that what LLVM does for speed. XLA aborts the
    # process where a device keeps the others waiting for a minute; on a busy machine eight
    # simulated ones wait for two cores.
    "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    " --xla_cpu_collective_call_terminate_timeout_seconds=300",
}

if version("jaxlib").startswith("0.10."):  # the last to know the option
    # Others compile the fusions of a tiny train step in a third of the time.
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"

# Commands that tests start hear SIGINT, also where the tests themselves run in the background.
signal.signal(signal.SIGINT, signal.default_int_handler)

import jax  # noqa: E402  (reads the variables above)

jax.config.update("jax_num_cpu_devices", 8)
jaxtyping.install_import_hook("dsjax", "beartype.beartype")

hypothesis.settings.register_profile("dsjax", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("dsjax")

NEEDS: dict[str, Callable[[], bool]] = {
    "gpu": lambda: jax.default_backend() == "gpu",
    "tpu": lambda: jax.default_backend() == "tpu",
    "cuda_compiler": lambda: importlib.util.find_spec("jax_cuda13_plugin") is not None,
    "chromium": lambda: shutil.which("chromium") is not None,
    "wandb": lambda: importlib.util.find_spec("wandb") is not None,
    "trackio": lambda: importlib.util.find_spec("trackio") is not None,
    "swanlab": lambda: importlib.util.find_spec("swanlab") is not None,
    "modelscope": lambda: importlib.util.find_spec("modelscope") is not None,
}
"""Marker -> whether what it names is here."""

ABSENT = pytest.StashKey[dict[str, int]]()


def pytest_configure(config: pytest.Config) -> None:
    """Start the count of tests that were left out, and a new compile cache if it is too large.

    JAX's own bound reads the age of every entry, under a lock, each time it writes one.
    """
    config.stash[ABSENT] = {}
    if not hasattr(config, "workerinput") and _size(CACHE) > CACHE_BYTES:
        shutil.rmtree(CACHE)


def _size(folder: Path) -> int:
    return sum(entry.stat().st_size for entry in os.scandir(folder)) if folder.exists() else 0


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out tests that need what is absent, and count them."""
    for marker, is_here in NEEDS.items():
        marked = [item for item in items if item.get_closest_marker(marker)]
        if marked and not is_here():
            config.hook.pytest_deselected(items=marked)
            items[:] = [item for item in items if item not in marked]
            config.stash[ABSENT][marker] = len(marked)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Iterator[object]:
    """Inside pytest's own record of warnings, which goes on."""
    with our_warnings.raise_ours():
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[object]:
    """What importing a test file warns of, too."""
    with our_warnings.raise_ours():
        return (yield)


def pytest_collection_finish() -> None:
    """Take what was imported out of every later garbage collection."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """In a worker process: hand the count to the process that prints."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["absent"] = session.config.stash[ABSENT]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: object, error: object) -> None:
    """In the process that prints: take over the count; every worker collects the same tests."""
    del error
    node.config.stash[ABSENT].update(getattr(node, "workeroutput", {}).get("absent", {}))


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Say how many tests were left out, and for want of what."""
    for marker, count in config.stash[ABSENT].items():
        absent = marker.replace("_", " ")
        terminalreporter.write_line(f"{count} tests were left out: there is no {absent} here")


@pytest.fixture
def run_cli() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `python -m dsjax.<module> <args>` in a process of its own, on simulated CPU devices."""

    def run(
        module: str,
        *args: object,
        devices: int = 1,
        cwd: Path | None = None,
        timeout: float = 600,
        env: dict[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        settings = {"JAX_NUM_CPU_DEVICES": str(devices), "PYTHONPATH": str(ROOT)}
        return subprocess.run(
            [sys.executable, "-m", f"dsjax.{module}", *map(str, args)],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=timeout,
            cwd=cwd,
            env=os.environ | settings | (env or {}),
        )

    return run
