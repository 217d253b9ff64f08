# SPDX-License-Identifier: Apache-2.0
"""What a report advises is what was not tried yet."""

import pytest

from dsjax.models.decoder import POLICIES
from dsjax.plan.report import suggestion_lines
from dsjax.plan.search import Suggestion


@pytest.mark.parametrize("policy", POLICIES)
def test_full_is_advised_only_where_it_was_not_tried(policy: str) -> None:
    tried = Suggestion("cpu:4", 4, ("mesh.fsdp=4",), policy, False, True, 10, 30, 20, ())
    advice = "" if policy == "full" else ", or training.gradient_checkpointing=full,"
    assert suggestion_lines([tried])[-1] == (
        f"nothing fits up to cpu:4; a shorter data.max_length{advice} might"
    )
