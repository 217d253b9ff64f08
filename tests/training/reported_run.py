# SPDX-License-Identifier: Apache-2.0
"""A run that only logs, as a process of its own: REPORTER FOLDER RESUME_STEP LAST_STEP."""

import sys
from pathlib import Path

from dsjax.config import LoggingSection
from dsjax.training.metrics_log import MetricsLog
from dsjax.training.run_dir import RunDir


def main(name: str, folder: str, resume_step: int, last: int) -> None:
    """Log the steps after `resume_step`, and an evaluation."""
    config = {"model": {"path": "deepseek-ai/tiny"}, "training": {"freeze": [], "max_steps": None}}
    section = LoggingSection(report_to=[name])
    with MetricsLog(RunDir(Path(folder)), section, resume_step, config=config) as log:
        log.log_start("model: {}", "module  parameters")
        for step in range(resume_step + 1, last + 1):
            log.log(step, {"loss": resume_step + 1 / step})
        log.log_eval(last, {"eval_loss": 2.0})


if __name__ == "__main__":
    main(*sys.argv[1:3], *map(int, sys.argv[3:]))
