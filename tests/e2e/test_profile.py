# SPDX-License-Identifier: Apache-2.0
"""logging.profile_steps: a run traces the steps that it was asked for."""

import pytest
import small_run
from small_run import traced_steps

from dsjax import train


@pytest.mark.slow
def test_a_run_traces_the_steps_that_it_was_asked_for(tmp_path, capsys) -> None:
    config = small_run.write_inputs(
        tmp_path,
        "lora",
        training={"max_steps": 4, "eval_steps": None},
        data={"eval": None},
        export={"format": None},
        logging={"report_to": [], "profile_steps": [1, 3]},
    )
    assert train.main(["--config", str(config)]) == 0
    (trace,) = (tmp_path / "run/tensorboard/plugins/profile").iterdir()
    assert f"trace: {trace}; open it with `tensorboard --logdir" in capsys.readouterr().err
    assert traced_steps(trace) == [2, 3]
    assert list(trace.glob("*.xplane.pb"))  # what TensorBoard's plugin reads
