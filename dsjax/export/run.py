# SPDX-License-Identifier: Apache-2.0
"""Write an export and prove it: merged weights or a PEFT adapter, in place of the old one.

In: the trained arrays of an `Assembly`, and the `Output` that they become. Out: a folder
that transformers or PEFT loads; what was written is read again and compared before the folder takes
its name. Not done here: whether it may be written (`folder`), the proof of the logits (`verify`).
"""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from dsjax.adapters import check_form
from dsjax.buckets import Bucket, Place
from dsjax.config import RunConfig
from dsjax.distributed.processes import Hosts
from dsjax.distributed.sharding import Params
from dsjax.errors import ConfigError, first_line
from dsjax.export import verify
from dsjax.export.folder import Output, check_own, is_exported, is_too_little, write_manifest
from dsjax.export.merge import changed_tensors
from dsjax.export.model_card import card_facts, kept_text, write_model_card
from dsjax.export.peft import write_peft
from dsjax.export.router_keys import write_router_keys
from dsjax.training.metrics_log import read_metrics
from dsjax.training.run_dir import MANIFEST
from dsjax.training.setup import Assembly
from dsjax.weights.bucket_folder import BucketDraft, Last
from dsjax.weights.drafts import Draft, new_folder
from dsjax.weights.fp8 import DequantisedSource
from dsjax.weights.generation_config import write_generation_config
from dsjax.weights.write import file_bytes, write_checkpoint


def check_export(config: RunConfig, setup: Assembly, form: str | None, field: str) -> None:
    """Refuse a form or a dtype in which this training cannot be exported; nothing is loaded yet.

    Args:
        config: the run's.
        setup: its model.
        form: merged or peft; None where nothing is exported at the end of the run.
        field: the key or option that asks for the form.

    Raises:
        ConfigError: this model or adapter has no such form; `export.dtype` is fp8, and the
            checkpoint is not.
    """
    if config.export.dtype == "fp8" and not isinstance(setup.source, DequantisedSource):
        raise ConfigError(
            f"export.dtype: got fp8, expected null; the checkpoint {config.model.path!r} is not in "
            "FP8"
        )
    if form is not None:
        check_form(setup.model, setup.spec, form, field)


def export_bytes(config: RunConfig, setup: Assembly, form: str, out: Place | None = None) -> int:
    """Bytes of the tensors that an export writes; no array need be there yet.

    Of one that goes to a bucket, those that are on this machine at a time: of the largest file.
    """
    leaves = {path: setup.partition.leaves[path] for path in setup.partition.trainable}
    if form == "peft":
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves.values())
    changes = changed_tensors(setup.model, setup.spec, leaves, setup.partition.layer_masks)
    sizes = file_bytes(setup.source, changes, config.export.dtype == "fp8").values()
    return max(sizes, default=0) if isinstance(out, Bucket) else sum(sizes)


PATIENCE = 60.0
"""Seconds that a process whose proof did not run waits to hear that no other's did either."""


class Proof(NamedTuple):
    """What the proof of merged weights found.

    Attributes:
        kept: of what training changed, the part that they keep; None: not measured.
        failure: what kept it from being computed; None: it was.
    """

    kept: float | None = None
    failure: Exception | None = None


class Exported(NamedTuple):
    """What became of an export.

    Attributes:
        written: whether anything was: an export with the same manifest is kept as it is.
        failure: why its proof did not run, for the caller to raise when all else is done.
    """

    written: bool
    failure: Exception | None = None

    def __str__(self) -> str:
        """For messages: `exported merged to X, unproven`."""
        return "" if self.failure is None else ", unproven; the reason follows"


class Trained(NamedTuple):
    """A model with its arrays; a merged export gives them up.

    Attributes:
        setup: the run's model.
        trainable: the trained arrays.
        frozen: all other arrays.
    """

    setup: Assembly
    trainable: Params
    frozen: Params


def export_trained(
    output: Output,
    trained: Trained,
    hosts: Hosts | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Exported:
    """Write and prove an export, beside its folder first; what lies there is replaced.

    Of several processes the first writes, and all prove the logits. The caller has made sure that
    the folder may be replaced (`check_replaceable`) before it did anything; here it is asked again.
    A merged export gives up the arrays: the proof loads what changed in their place, never beside
    them. Where the proof finds another model the export is refused. Where it cannot be computed,
    for want of memory, the export stands, and its card and manifest say so; the next run of the
    same command tries again.

    Args:
        output: what the export is, and where it goes.
        trained: what is exported.
        hosts: this process among those of the run; None for a process alone.
        progress: called with the bytes written so far and in all.

    Raises:
        DifferentLogitsError: what was written is not the trained model.
        ConfigError: it keeps less than `export.min_kept` of what training changed.
    """
    hosts, proof, out = hosts or Hosts(), Proof(), output.path
    digests: dict[str, str] = {}
    manifest, section = output.manifest(), output.config.export
    card = card_facts(
        output.config, trained.setup, output.form, output.step, read_metrics(output.run.metrics)
    )
    if hosts.broadcast_from_primary(lambda: is_exported(out, manifest, section.min_kept)):
        return Exported(False)
    check = partial(check_own, out, output.name, output.field)
    last = Last(MANIFEST, json.dumps({**manifest, "incomplete": True}).encode())
    with new_folder(out, output.field, last, hosts.primary, check) as draft:
        directory = draft.directory
        if output.form == "peft":
            write_peft(directory, trained.setup, trained.trainable, hosts.primary)
        else:
            fp8 = section.dtype == "fp8"
            proof, digests = _write_merged(draft, trained, fp8, hosts, progress)
            _check_kept(proof, section.min_kept, fp8, hosts)
        if proof.failure is not None:
            card = replace(card, unproven=first_line(proof.failure))
            manifest = {**manifest, "proof": f"did not run: {card.unproven}"}
        if hosts.primary:
            write_model_card(directory, replace(card, kept=proof.kept))
            write_manifest(directory, manifest, proof.kept, draft.contents(digests))
    return Exported(True, proof.failure)


def _write_merged(
    draft: Draft | BucketDraft,
    trained: Trained,
    fp8: bool,
    hosts: Hosts,
    progress: Callable[[int, int], None],
) -> tuple[Proof, dict[str, str]]:
    """Write merged weights, and prove them once all processes see them; gives up the arrays.

    Returns:
        The proof, and the digest of each file of weights as it was read again.
    """
    setup, trainable, frozen = trained
    directory = draft.directory
    changes = changed_tensors(setup.model, setup.spec, trainable, setup.partition.layer_masks)
    send = draft.send if isinstance(draft, BucketDraft) else None
    digests = write_checkpoint(
        setup.source, directory, changes, progress, fp8, hosts.primary, send, draft.share
    )
    if hosts.primary:
        write_generation_config(directory, setup.source)
        write_router_keys(directory, setup.model)
    place = draft.share()
    hosts.barrier()  # written: all read it
    prove = partial(verify.prove, setup, trainable, frozen, place, changes.keys())
    return run_proof(prove, hosts), digests  # and all have read it: it may take its name


def run_proof(prove: Callable[[], float | None], hosts: Hosts) -> Proof:
    """Run the proof; what kept it from being computed on any process, keeps it on all.

    A process that fails alone ends all: the others wait in the middle of a computation for it.

    Raises:
        DifferentLogitsError: it ran, and found another model.
        ConfigError: what was written cannot be opened.
    """
    kept = failure = None
    try:
        kept = prove()
    except (ConfigError, OSError, verify.DifferentLogitsError):
        raise
    except Exception as error:
        failure = error
        hosts.log_once(f"the proof of the export did not run: {first_line(error)}")
    try:
        told = hosts.all_gather_text(
            "" if failure is None else first_line(failure),
            math.inf if failure is None else PATIENCE,
        )
    except TimeoutError:
        assert failure is not None
        raise failure from None
    others = [RuntimeError(f"process {i}: {text}") for i, text in enumerate(told) if text]
    failure = failure or next(iter(others), None)
    return Proof(kept if failure is None else None, failure)


def _check_kept(proof: Proof, least: float | None, again_fp8: bool, hosts: Hosts) -> None:
    """Say what merged weights keep of a training, and refuse them if it is too little.

    Raises:
        ConfigError: it is.
    """
    kept = proof.kept
    if proof.failure is not None:
        return
    if kept is None:
        hosts.log_once(
            "kept: not measured; training changed no logits beyond rounding, or the file's numbers "
            "are finer than the run's"
        )
        return
    hosts.log_once(kept_text(kept))
    if is_too_little(kept, least):
        wider = "export.dtype=null, which writes bfloat16, " if again_fp8 else ""
        raise ConfigError(
            f"export.min_kept: got weights that keep {kept:.3g} of what training changed in the "
            f"logits, expected at least {least:g}; rounding to the file's numbers takes the rest. "
            f"Set {wider}export.format=peft, where there is an adapter, or train further; a lower "
            "export.min_kept, or null, writes them nevertheless"
        )
