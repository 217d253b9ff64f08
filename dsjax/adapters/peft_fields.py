# SPDX-License-Identifier: Apache-2.0
"""Values in adapter_config.json, held against the rules of the YAML's keys of the same names.

In: the fields. Out: what is wrong with them, in words. Not done here: fields that the YAML has not
(the methods' own files), the file (`weights.peft`).
"""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from dsjax.config import AdapterSection, rules


class _Shared(BaseModel):
    """The keys that adapter_config.json has in common with the YAML, under the same rules."""

    adapter: AdapterSection


def value_problems(field: str, config: Mapping[str, Any], required: str) -> list[str]:
    """Say what is wrong with fields that are keys of the `adapter` section too.

    Args:
        field: what messages begin with.
        config: adapter_config.json.
        required: a key that has to be there.
    """
    keys = AdapterSection.model_fields.keys() - {"peft_type", "path", "init_lora_weights"}
    config = {**config, "exclude_modules": config.get("exclude_modules") or None}
    if config.get("target_parameters"):
        config = {key: value for key, value in config.items() if value != []}
    given = {key: config.get(key) for key in keys if key == required or config.get(key) is not None}
    try:
        _Shared.model_validate({"adapter": given})
    except ValidationError as error:
        lines = rules.problems(error, {"adapter": given}, _Shared, {})
        return [f"{field} {line.removeprefix('adapter.')}" for line in lines]
    return []
