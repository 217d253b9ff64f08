# SPDX-License-Identifier: Apache-2.0
"""Evaluate: the loss of a model over files, exact to the token, as JSON on stdout.

    python -m dsjax.evaluate --config FILE [section.key=value ...]
    python -m dsjax.evaluate --model DIR [--adapter DIR] --data FILE [--data FILE ...]

With `--config`: `data.eval`, with the newest checkpoint of the run in `output_dir` if it has one,
else with the model as configured. stderr says which, and how far it is. Not done here: the sums
(`evaluation`), generation.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
from absl import flags

from dsjax.assembly import CHECKPOINTS, Assembly, assemble, load_frozen, load_trainable
from dsjax.assembly import restore_trained
from dsjax.checkpoint import Checkpointer
from dsjax.config import (
    AdapterSection,
    DataSection,
    ModelSection,
    RunConfig,
    TrainingSection,
    differing_keys,
    load_config,
)
from dsjax.data import DataReport, Loader, load_examples, load_tokenizer
from dsjax.errors import ConfigError, raise_all, renamed, run_command
from dsjax.evaluation import evaluate_loss
from dsjax.partition import Params
from dsjax.sharding import batch_shards, check_batch
from dsjax.step import make_eval_step, step_config
from dsjax.terminal import Loading
