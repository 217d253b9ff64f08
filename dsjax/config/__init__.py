# SPDX-License-Identifier: Apache-2.0
"""The configuration of a run: every key typed, documented, strict.

In: a YAML file and `section.key=value` words. Out: a frozen `RunConfig`, or one `ConfigError` that
names every wrong key. The parts: `sections` (keys), `load` (file -> RunConfig; what cannot stand
together), `rules` (each key in words), `yaml_file` (YAML and dotted words), `command_line`,
`commands` (the console script), `train_options` (texts of train), `paths` (URLs), `patterns`
(regular expressions with a time limit), `json_file` (JSON of foreign files), `other_trainers` and
`convert_config` (files of LLaMA-Factory and TRL). Not done here: anything that needs the
checkpoint, the data or the devices.
"""

from dsjax.config.load import (
    RunConfig,
    describe,
    export_format,
    json_schema,
    load_config,
    load_run,
    located,
    make_config,
    to_yaml,
)
from dsjax.config.sections import (
    AdapterSection,
    CheckpointSection,
    DataSection,
    ExportSection,
    LoggingSection,
    MeshSection,
    ModelSection,
    ObjectiveSection,
    OptimizerSection,
    TrainingSection,
)
from dsjax.config.yaml_file import split_arguments

__all__ = [
    "AdapterSection",
    "CheckpointSection",
    "DataSection",
    "ExportSection",
    "LoggingSection",
    "MeshSection",
    "ModelSection",
    "ObjectiveSection",
    "OptimizerSection",
    "RunConfig",
    "TrainingSection",
    "describe",
    "export_format",
    "json_schema",
    "load_config",
    "load_run",
    "located",
    "make_config",
    "split_arguments",
    "to_yaml",
]
