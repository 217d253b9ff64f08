# SPDX-License-Identifier: Apache-2.0
"""What a run's checkpoint says of the run, held against the files that it goes on with.

In: an output directory and an `Assembly`. Out: the trained arrays and what was saved beside them,
or a `ConfigError` where the weights or the data are others by now. Not done here: how a checkpoint
lies on disk (`checkpoint`).
"""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Annotated, Any, NamedTuple

import jax
from pydantic import AfterValidator, BaseModel, Field, ValidationError

from dsjax.config import RunConfig
from dsjax.distributed.checksums import checksums
from dsjax.distributed.sharding import Params
from dsjax.errors import ConfigError, raise_all
from dsjax.training.checkpoint import Checkpointer, from_newest
from dsjax.training.run_dir import RunDir
from dsjax.training.setup import Assembly


class Restored(NamedTuple):
    """What a checkpoint holds of a run.

    Attributes:
        step: the optimizer step.
        trainable: the trained arrays.
        meta: what was saved beside the state.
    """

    step: int
    trainable: Params
    meta: dict[str, Any]


def restore_trained(config: RunConfig, setup: Assembly) -> Restored:
    """Restore the trained arrays of a run's newest complete checkpoint; the run may be alive.

    Raises:
        ConfigError: the run has no complete checkpoint, or one of another model.
    """
    return from_newest(lambda: _restore_newest(config, setup))


def _restore_newest(config: RunConfig, setup: Assembly) -> Restored:
    run = RunDir.of(config)
    checkpointer = Checkpointer(run.checkpoints, config.checkpoint, read_only=True)
    step = checkpointer.latest()
    if step is None:
        raise ConfigError(
            f"{run.checkpoints}: got no complete checkpoint, expected one; train first"
        )
    meta = read_meta(checkpointer, step)
    check_contents(setup.contents(), meta["contents"], run)
    shardings, leaves = setup.shardings, setup.partition.leaves
    abstract = {
        path: jax.ShapeDtypeStruct(leaves[path].shape, leaves[path].dtype, sharding=shardings[path])
        for path in setup.partition.trainable
    }
    state = checkpointer.restore(step, {"trainable": abstract}, partial=True)
    checkpointer.close()
    return Restored(step, state["trainable"], meta)


class _Meter(BaseModel, strict=True, extra="forbid"):
    since_log: dict[str, float]
    run: dict[str, float]
    untrained_steps: int = 0
    ahead: dict[str, float] = {}  # of earlier versions


class _Meta(BaseModel, strict=True):
    """What a run saves beside its state (`loop`), as those who go on with it need it."""

    started: Annotated[str, AfterValidator(datetime.fromisoformat)]
    contents: dict[str, str]
    frozen: dict[str, Annotated[list[str], Field(min_length=2, max_length=2)]]
    meter: _Meter | None = None


def read_meta(checkpointer: Checkpointer, step: int) -> dict[str, Any]:
    """Read what a run saved beside its state.

    Raises:
        ConfigError: it is damaged, or is not what this version's runs save.
    """
    meta = checkpointer.meta(step)
    try:
        _Meta.model_validate(meta)
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(
            f"{checkpointer.place(step)}: got a checkpoint whose "
            f"{'.'.join(map(str, first['loc']))} is not what this version saves ({first['msg']}), "
            "expected one that it can go on with; finish the run with the version that began it, "
            "or choose another output_dir"
        ) from error
    return meta


def check_contents(found: Mapping[str, str], began: Mapping[str, str], run: RunDir) -> None:
    """Refuse to read anything else than a run began with.

    Args:
        found: digests of what lies there now, by the keys that name it.
        began: those that the run's checkpoint holds.
        run: the run's directory, for the message.
    """
    raise_all(
        f"{key}: got other contents ({found[key]}) than those with which the run in {str(run)!r} "
        f"began ({began.get(key)}), expected the same; restore them, or choose another output_dir"
        for key in found
        if found[key] != began.get(key)
    )


def frozen_sums(frozen: Params) -> dict[str, list[str]]:
    """Dtype and checksum of every frozen array."""
    sums = checksums(dict(frozen))
    return {path: [str(array.dtype), sums[path]] for path, array in frozen.items()}


def check_frozen(frozen: Params, began: Mapping[str, Sequence[str]], run: RunDir) -> None:
    """Hold the frozen arrays, all of their numbers, against those that a run began with.

    Arrays that are held in another dtype, or that only one of the two has, are not compared.
    """
    found = frozen_sums(frozen)
    other = [
        path
        for path, (dtype, value) in found.items()
        if path in began and began[path][0] == dtype and began[path][1] != value
    ]
    if other:
        more = f" and {len(other) - 1} more have" if len(other) > 1 else " has"
        raise ConfigError(
            f"model.path: got a checkpoint whose {other[0]}{more} other numbers than when the run "
            f"in {str(run)!r} began, expected the same weights; restore them, or choose another "
            "output_dir"
        )
