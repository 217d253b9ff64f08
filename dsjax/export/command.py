# SPDX-License-Identifier: Apache-2.0
"""Out again: a merged Hugging Face checkpoint, or the adapter as PEFT saves it.

In: the source checkpoint, the trained arrays, and where to write. Out: a folder that transformers
or PEFT loads. A merged export streams the source's files: what training did not touch is copied
byte for byte, the rest is computed in float32 a few rows at a time and written in the source's
dtype. What was written is read again and compared before the folder takes its name.

    python -m dsjax.export --run DIR --out DIR --format merged|peft

Not done here: training; deciding what to write by default (`config.export_format`).
"""

import os
import sys
from argparse import Namespace
from collections.abc import Sequence

from dsjax.buckets import Place, open_place
from dsjax.config import MeshSection
from dsjax.config.inputs import may_download
from dsjax.distributed.bootstrap import refuse_several
from dsjax.distributed.compilation_cache import keep_compiled
from dsjax.errors import ConfigError
from dsjax.export.folder import Output, check_free, check_own
from dsjax.export.options import make_parser
from dsjax.export.run import Trained, check_export, export_bytes, export_trained
from dsjax.training.console import Loading, exporting, working
from dsjax.training.restore import check_frozen, restore_trained
from dsjax.training.run_dir import RunDir, run_config
from dsjax.training.setup import assemble, load_frozen
from dsjax.training.working_copy import fetched
from dsjax.weights.folders import check_room, leftovers_of, written_at

OVERRIDES = ("model.path", "model.revision", "adapter.path", "export.dtype", "export.min_kept")
"""Keys of the run's configuration that may be other ones for an export."""


def main(argv: Sequence[str]) -> int:
    """Export the newest checkpoint of a run, finished or not."""
    words = make_parser().parse_intermixed_args(argv)
    refuse_several("dsjax.export", os.environ)
    keep_compiled(os.environ)
    run, out = RunDir.at(words.run), open_place(words.out, "--out")
    with fetched(run):
        return _export(words, run, out)


def _export(words: Namespace, run: RunDir, out: Place) -> int:
    """Export a run whose small files are here."""
    # Not the run's mesh, which may be a pod's: what is here serves, and changes no byte.
    here = {"mesh": MeshSection(), "output_dir": str(run)}
    unread = [word for word in words.overrides if word.partition("=")[0] not in OVERRIDES]
    if unread:
        raise ConfigError(f"{unread[0]}: got it for an export, expected {', '.join(OVERRIDES)}")
    config = run_config(run, words.overrides).model_copy(update=here)
    check_free(out, config, "--out")  # before anything is loaded
    with working("opening the checkpoint", not may_download(config.model.path), at_once=False):
        setup = assemble(config)
    form = words.format
    check_export(config, setup, form, "--format")
    with working("restoring the newest step", at_once=False):
        step, trainable, meta = restore_trained(config, setup)
    output = Output(config, form, step, meta["meter"]["run"], meta["contents"], out, "--out")
    check_own(out, output.name, "--out")
    size = export_bytes(config, setup, form, out)
    check_room(written_at(out), {"the export": size}, "--out", leftovers_of(out))
    frozen = load_frozen(setup, config.training.seed, Loading())
    with working("summing the weights that stay", at_once=False):
        check_frozen(frozen, meta["frozen"], run)
    with exporting() as written:
        done = export_trained(output, Trained(setup, trainable, frozen), progress=written)
    verb = "exported" if done.written else "already there:"
    print(f"{verb} step {step} as {form} to {out}{done}", file=sys.stderr)
    if done.failure is not None:
        raise done.failure
    return 0
