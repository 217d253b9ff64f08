# SPDX-License-Identifier: Apache-2.0
"""Processes of a run for tests of what they say to one another: threads, and a dict for the store.

What real processes do is in `tests/hosts/`.
"""

import threading
from collections.abc import Callable

import jax

SECONDS = 30
"""After which threads wait for one another."""


class DictStore:
    """The coordinator's store."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}
        self._changed = threading.Condition()

    def key_value_set(self, key: str, value: str, allow_overwrite: bool = False) -> None:
        with self._changed:
            if key in self.values and not allow_overwrite:
                raise jax.errors.JaxRuntimeError("ALREADY_EXISTS")
            self.values[key] = value
            self._changed.notify_all()

    def key_value_dir_get(self, key: str) -> list[tuple[str, str]]:
        with self._changed:
            return [(name, value) for name, value in self.values.items() if name.startswith(key)]

    def blocking_key_value_get(self, key: str, timeout_in_ms: int) -> str:
        with self._changed:
            if not self._changed.wait_for(lambda: key in self.values, timeout_in_ms / 1000):
                raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED")
            return self.values[key]


def in_threads(tasks: list[Callable[[], object]]) -> list[object]:
    """Run all at once; returns what they return."""
    results: list[object] = [None] * len(tasks)

    def keep(index: int) -> None:
        results[index] = tasks[index]()

    threads = [threading.Thread(target=keep, args=(i,), daemon=True) for i in range(len(tasks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
        assert not thread.is_alive(), "they wait for one another"
    return results
