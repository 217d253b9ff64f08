# SPDX-License-Identifier: Apache-2.0
"""One of two processes of a run, of which the second takes longer to read the weights.

Run by `test_hosts_train.py`. The first time that devices of several processes compute together they
leave their addresses with the coordinator, and give up on one that does not come within 30 seconds.
So as long as the second reads, there may be none. They end once they have talked, and compile no
step, which does not matter here.
"""

import time
from typing import Any, NoReturn

import jax

from dsjax import train
from dsjax.distributed.jax_internals import coordinator_client
from dsjax.errors import run_command

SECONDS = 3
ADDRESSES = "cpu:gloo/"

load_frozen, frozen_sums = train.load_frozen, train.frozen_sums


def has_talked() -> bool:
    """Whether devices have tried to find those of the other process."""
    client = coordinator_client()
    assert client is not None
    return bool(client.key_value_dir_get_bytes(ADDRESSES))


def load_late(*arguments: Any) -> Any:
    """Read the weights, the second process for longer."""
    loaded = load_frozen(*arguments)
    if jax.process_index() == 1:
        time.sleep(SECONDS)
        assert not has_talked(), "the first process has not waited"
    return loaded


def end_after_talk(frozen: Any) -> NoReturn:
    """Do what devices first do together, and end."""
    frozen_sums(frozen)
    assert has_talked(), f"nothing of {ADDRESSES}: where do the addresses lie now?"
    raise SystemExit(0)


if __name__ == "__main__":
    train.load_frozen, train.frozen_sums = load_late, end_after_talk
    train.compile_step, train.compile_evaluation = lambda *_: (None, "none"), lambda *_: None
    run_command(train.main)
