# SPDX-License-Identifier: Apache-2.0
"""Out again: a merged Hugging Face checkpoint, or the adapter as PEFT saves it.

In: the source checkpoint, the trained arrays, and where to write. Out: a folder that transformers
or PEFT loads. A merged export streams the source's files: what training did not touch is copied
byte for byte, the rest is computed in float32 a few rows at a time and written in the source's
dtype. What was written is read again and compared before the folder takes its name.

    python -m dsjax.export --run DIR --out DIR --format merged|peft

Not done here: training; deciding what to write by default (`config.export_format`).
"""

if __name__ == "__main__":
    from dsjax.signals import end_at_once

    end_at_once()  # what is imported below takes seconds

import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dsjax import adapters, logit_proof
from dsjax.adapters import peft_files
from dsjax.assembly import (
    Assembly,
    assemble,
    check_frozen,
    load_frozen,
    restore_trained,
)
from dsjax.command_line import CommandParser
from dsjax.config import AdapterSection, MeshSection, RunConfig, load_config
from dsjax.continuation import identity
from dsjax.errors import ConfigError, first_line, run_command
from dsjax.eval_results import evaluated_rows
from dsjax.export_folder import (
    check_free,
    check_own,
    export_marker,
    is_exported,
    is_too_little,
    write_marker,
)
from dsjax.flax_checkpoint import is_flax_checkpoint, open_flax
from dsjax.folders import check_apart, check_empty, check_room, leftovers_of, written_beside
from dsjax.fp8 import DequantisedSource
from dsjax.gather import host_array
from dsjax.generation_config import added_stop, write_generation_config
from dsjax.hf_files import SafetensorsWriter
from dsjax.hosts import Hosts
from dsjax.merge import changed_tensors, checkpoint_bytes, write_checkpoint
from dsjax.metrics import METRICS_FILE, read_metrics
from dsjax.model_card import CardFacts, kept_text, source_license, write_model_card
from dsjax.partition import Params
from dsjax.rendezvous import refuse_several
from dsjax.storage import is_url, written_to_url


def to_hf(
    src: str, dst: str, progress: Callable[[int, int], None] = lambda done, total: None
) -> None:
    """Turn a dsjax checkpoint back into the Hugging Face checkpoint that it was made from."""
    if not is_flax_checkpoint(src):
        raise ConfigError(f"source: got {src!r}, expected a directory written by to-flax")
    check_empty(dst)
    check_apart(dst, "output directory", {"source": src})
    source = open_flax(src)
    with written_beside(Path(dst), check=lambda: check_empty(dst)) as directory:
        write_checkpoint(source, directory, {}, progress)


def write_peft(directory: Path, parts: Assembly, trained: Params, primary: bool = True) -> None:
    """Write PEFT's adapter folder, and prove that it reads back as the same adapter.

    Of several processes the `primary` one writes; the others help it to the arrays.

    Raises:
        RuntimeError: it does not.
    """
    model, spec = parts.model, parts.spec
    assert spec is not None
    gathered = {path: host_array(array, primary) for path, array in trained.items()}
    if not primary:
        return
    host = {path: array for path, array in gathered.items() if array is not None}
    config = adapters.peft_config(model, spec, base_name(parts))
    text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False)
    (directory / peft_files.CONFIG).write_text(text + "\n", "utf-8")
    tensors = adapters.peft_tensors(model, spec, host)
    entries = [(name, array.dtype, array.shape) for name, array in sorted(tensors.items())]
    with SafetensorsWriter(directory / peft_files.TENSORS, entries) as writer:
        for name, _, _ in entries:
            writer.append(name, tensors[name])
    again = adapters.resolve(AdapterSection(path=str(directory)))
    assert again is not None
    read = peft_files.read_params(str(directory), model, again, parts.partition.leaves)
    wrong = [path for path in host if not np.array_equal(host[path], read[path])]
    if wrong or adapters.peft_config(model, again, base_name(parts)) != config:
        raise RuntimeError(f"{directory}: the adapter read back differs from the trained: {wrong}")


def base_name(parts: Assembly) -> str:
    """What an adapter's config names as its base: the model's path as the user gave it."""
    return parts.section.path


def check_dtype(config: RunConfig, parts: Assembly) -> None:
    """Refuse to write FP8 where there was none.

    Raises:
        ConfigError: `export.dtype` is fp8, and the checkpoint is not.
    """
    if config.export.dtype == "fp8" and not isinstance(parts.source, DequantisedSource):
        raise ConfigError(
            f"export.dtype: got fp8, expected null; the checkpoint {config.model.path!r} is not in "
            "FP8"
        )


def export_bytes(config: RunConfig, parts: Assembly, form: str) -> int:
    """Bytes of the tensors that an export writes; no array need be there yet."""
    leaves = {path: parts.partition.leaves[path] for path in parts.partition.trainable}
    if form == "peft":
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves.values())
    changes = changed_tensors(parts.model, parts.spec, leaves, parts.partition.layer_masks)
    return checkpoint_bytes(parts.source, changes, config.export.dtype == "fp8")


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
        written: whether anything was: an export with the same marker is kept as it is.
        failure: why its proof did not run, for the caller to raise when all else is done.
    """

    written: bool
    failure: Exception | None = None

    def __str__(self) -> str:
        """For messages: `exported merged to X, unproven`."""
        return "" if self.failure is None else ", unproven; the reason follows"


def export_trained(
    parts: Assembly,
    trainable: Params,
    frozen: Params,
    out: Path,
    marker: Mapping[str, Any],
    card: CardFacts,
    progress: Callable[[int, int], None] = lambda done, total: None,
    hosts: Hosts | None = None,
    field: str = "export.path",
    min_kept: float | None = None,
) -> Exported:
    """Write and prove an export, beside `out` first; what lies at `out` is replaced.

    Of several processes the first writes, and all prove the logits. The caller has made sure that
    `out` may be replaced (`check_replaceable`) before it did anything; here it is asked again. A
    merged export gives up the arrays: the proof loads what changed in their place, never beside
    them. Where the proof finds another model the export is refused. Where it cannot be computed,
    for want of memory, the export stands, and its card and marker say so; the next run of the same
    command tries again.

    Args:
        parts: the run's model.
        trainable: the trained arrays.
        frozen: all other arrays.
        out: the export's folder.
        marker: from `export_marker`, of these arrays.
        card: the model card's facts.
        progress: told the bytes written so far and in all.
        hosts: this process among those of the run; None for a process alone.
        field: how messages call `out`.
        min_kept: `export.min_kept`.

    Raises:
        DifferentLogitsError: what was written is not the trained model.
        ConfigError: it keeps less than `min_kept` of what training changed.
    """
    hosts, proof = hosts or Hosts(), Proof()
    if hosts.decide(lambda: is_exported(out, marker, min_kept)):
        return Exported(False)
    check = partial(check_own, out, marker["run"], field)
    with written_beside(out, field, hosts.primary, check) as directory:
        if marker["format"] == "peft":
            write_peft(directory, parts, trainable, hosts.primary)
        else:
            fp8 = marker.get("dtype") == "fp8"
            proof = _write_merged(directory, parts, trainable, frozen, fp8, progress, hosts)
            _check_kept(proof, min_kept, fp8, hosts)
        if proof.failure is not None:
            card = replace(card, unproven=first_line(proof.failure))
            marker = {**marker, "proof": f"did not run: {card.unproven}"}
        if hosts.primary:
            write_model_card(directory, replace(card, kept=proof.kept))
            write_marker(directory, marker, proof.kept)
    return Exported(True, proof.failure)


def _write_merged(
    directory: Path,
    parts: Assembly,
    trainable: Params,
    frozen: Params,
    fp8: bool,
    progress: Callable[[int, int], None],
    hosts: Hosts,
) -> Proof:
    """Write merged weights, and prove them once all processes see them; gives up the arrays."""
    changes = changed_tensors(parts.model, parts.spec, trainable, parts.partition.layer_masks)
    write_checkpoint(parts.source, directory, changes, progress, fp8, hosts.primary)
    if hosts.primary:
        write_generation_config(directory, parts.source)
    hosts.barrier()  # written: all read it
    prove = partial(logit_proof.prove, parts, trainable, frozen, directory, changes.keys())
    return run_proof(prove, hosts)  # and all have read it: it may take its name


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
    except (ConfigError, OSError, logit_proof.DifferentLogitsError):
        raise
    except Exception as error:
        failure = error
        hosts.say(f"the proof of the export did not run: {first_line(error)}")
    try:
        told = hosts.exchange(
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
        hosts.say(
            "kept: not measured; training changed no logits beyond rounding, or the file's numbers "
            "are finer than the run's"
        )
        return
    hosts.say(kept_text(kept))
    if is_too_little(kept, least):
        wider = "export.dtype=null, which writes bfloat16, " if again_fp8 else ""
        raise ConfigError(
            f"export.min_kept: got weights that keep {kept:.3g} of what training changed in the "
            f"logits, expected at least {least:g}; rounding to the file's numbers takes the rest. "
            f"Set {wider}export.format=peft, where there is an adapter, or train further; a lower "
            "export.min_kept, or null, writes them nevertheless"
        )


PARAMETER_TARGETS = (
    "This adapter names weights in `target_parameters`. It is for peft 0.21 and transformers 5 or "
    "later; earlier ones may leave a part of it out without a word."
)


TURN_END = (
    "Turns end with `{1}` (token {0}), at which the base model's own files do not stop: generate "
    "with `eos_token_id={2}`, which the generation_config.json of a merged model says already."
)


def card_facts(config: RunConfig, parts: Assembly, form: str, step: int, rows: list) -> CardFacts:
    """What the model card says of a run."""
    stop = added_stop(parts.source)
    by_parameter = form == "peft" and adapters.targets_parameters(parts.model, parts.spec)
    return CardFacts(
        base_model=config.model.path,
        library_name="peft" if form == "peft" else "transformers",
        method=parts.spec.peft_type if parts.spec else "full fine-tuning",
        step=step,
        hyperparameters={
            **config.optimizer.model_dump(),
            **config.training.model_dump(),
            **(vars(parts.spec) if parts.spec else {}),
            "max_length": config.data.max_length,
            "packing": config.data.packing,
        },
        metrics=rows,
        license=source_license(parts.source.directory, parts.source.config),
        needs=PARAMETER_TARGETS if by_parameter else "",
        stops="" if stop is None else TURN_END.format(*stop),
    )


def main(argv: Sequence[str]) -> int:
    """Export the newest checkpoint of a run, finished or not."""
    parser = CommandParser("python -m dsjax.export", main.__doc__)
    parser.add_argument("--run", required=True, help="output_dir of a run")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--format", required=True, choices=("merged", "peft"))
    words = parser.parse_args(argv)
    refuse_several("dsjax.export", os.environ)
    if is_url(words.out):
        raise ConfigError(written_to_url(words.out, "--out"))
    run, out = Path(words.run), Path(words.out)
    # Not the run's mesh, which may be a pod's: what is here serves, and changes no byte.
    here = {"mesh": MeshSection(), "output_dir": str(run)}
    config = run_config(run).model_copy(update=here)
    check_free(out, config, "--out")  # before anything is loaded
    parts = assemble(config)
    form = _checked_form(words.format, parts)
    check_dtype(config, parts)
    step, trainable, meta = restore_trained(run, config, parts)
    name = identity(config, meta["contents"])
    check_own(out, name, "--out")
    size = export_bytes(config, parts, form)
    check_room(out, {"the export": size}, "--out", leftovers_of(out))
    sums = meta["meter"]["run"]
    marker = export_marker(config, name, form, step, sums, evaluated_rows(run))
    frozen = load_frozen(parts, config.training.seed)
    check_frozen(frozen, meta["frozen"], run)
    facts = card_facts(config, parts, form, step, read_metrics(run / METRICS_FILE))
    least = config.export.min_kept
    done = export_trained(
        parts, trainable, frozen, out, marker, facts, field="--out", min_kept=least
    )
    said = "exported" if done.written else "already there:"
    print(f"{said} step {step} as {form} to {out}{done}", file=sys.stderr)
    if done.failure is not None:
        raise done.failure
    return 0


def _checked_form(form: str, parts: Assembly) -> str:
    kind = parts.spec.peft_type if parts.spec else None
    if form == "peft" and kind is None:
        raise ConfigError("--format: got peft for a run without an adapter, expected merged")
    if form == "peft" and parts.spec is not None:
        adapters.check_peft_form(parts.model, parts.spec)
    if form == "merged" and kind == "PREFIX_TUNING":
        raise ConfigError(
            "--format: got merged with PREFIX_TUNING, expected peft; a prefix has no merged form"
        )
    return form


def run_config(run: Path) -> RunConfig:
    """The resolved configuration of a run."""
    file = run / "config.yaml"
    if not file.is_file():
        raise ConfigError(f"--run: got {str(run)!r}, expected the output_dir of a run; no {file}")
    return load_config(file)


if __name__ == "__main__":
    run_command(main)
