# SPDX-License-Identifier: Apache-2.0
"""What is no method of the registry is no adapter, and never full training in silence."""

from typing import get_args

import pytest

from dsjax.adapters import ADAPTERS, method_of
from dsjax.config import AdapterSection
from dsjax.config.sections import UNMERGED, AdapterType
from dsjax.weights.adapter import resolve


def test_each_type_of_the_section_has_a_method():
    assert set(get_args(AdapterType)) == set(ADAPTERS)


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_method_s_keys_are_the_section_s(name: str):
    assert set(ADAPTERS[name].keys) <= AdapterSection.model_fields.keys()
    assert (ADAPTERS[name].merged is None) == (name in UNMERGED)


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_type_is_resolved_to_its_own_config(name: str):
    spec = resolve(AdapterSection(peft_type=name))
    assert spec is not None and spec.peft_type == name and method_of(spec) is ADAPTERS[name]


def test_none_is_full_training():
    assert resolve(AdapterSection(peft_type=None)) is None


def test_a_type_without_a_method_trains_nothing():
    section = AdapterSection.model_construct(peft_type="DORA", path=None)
    with pytest.raises(KeyError):
        resolve(section)
