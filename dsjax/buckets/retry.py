# SPDX-License-Identifier: Apache-2.0
"""Requests that are made again: a store that is asked a lot refuses some, and loses others.

In: a request that can be made twice. Out: its answer, or what the store said at last. Not done
here: what the user is told then.
"""

import random
import sys
import time
from collections.abc import Callable
from typing import TypeVar

from dsjax.buckets.connection import reason
from dsjax.errors import ConfigError

DELAYS = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Seconds before each new try, each up to half as much again, so that hosts spread."""

_ANSWERS = (FileNotFoundError, FileExistsError, IsADirectoryError, PermissionError, ConfigError)
"""What another try does not change."""

T = TypeVar("T")


def again(request: Callable[[], T], place: str) -> T:
    """Make a request until it is answered.

    Args:
        request: it.
        place: what it is about, for the line that each failure prints.

    Raises:
        Exception: the last one, of whatever class the store's library has.
    """
    for delay in DELAYS:
        try:
            return request()
        except _ANSWERS:
            raise
        except Exception as error:
            wait = delay * (1 + random.random() / 2)
            print(f"{place}: {reason(error)}; again in {wait:.0f} s", file=sys.stderr)
            time.sleep(wait)
    return request()
