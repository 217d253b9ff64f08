# SPDX-License-Identifier: Apache-2.0
"""A warning is an error where our code raised it or called what announced it, and only there."""

import importlib
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
from our_warnings import raise_ours

LIBRARIES = {
    "announcer": """
import warnings

def old(stacklevel=1):
    warnings.warn("old is deprecated", FutureWarning, stacklevel=stacklevel)

def deep():
    old()

def apply(function):
    return function()
""",
    "caller": """
import announcer

def use():
    announcer.old()

def apply(function):
    return function()
""",
}


@pytest.fixture
def libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[ModuleType]]:
    """`announcer`, which warns, and `caller`, which calls it, installed for the test alone."""
    folder = tmp_path / "site-packages"
    folder.mkdir()
    for name, text in LIBRARIES.items():
        (folder / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(folder)
    yield [importlib.import_module(name) for name in LIBRARIES]
    for name in LIBRARIES:
        del sys.modules[name]


def told(call: Callable[[], object]) -> list[str]:
    """The warnings that are recorded, as pytest does, while `call` runs."""
    with warnings.catch_warnings(record=True) as record, raise_ours():
        warnings.simplefilter("always")
        call()
    return [str(one.message) for one in record]


def test_what_a_library_says_of_another_is_recorded(libraries):
    assert told(libraries[1].use) == ["old is deprecated"]


@pytest.mark.parametrize("stacklevel", [1, 2, 3])
def test_what_a_library_says_of_our_call_is_raised(libraries, stacklevel: int):
    with pytest.raises(FutureWarning, match="old is deprecated"):
        told(lambda: libraries[0].old(stacklevel))


def test_what_a_library_says_of_itself_under_our_call_is_raised(libraries):
    with pytest.raises(FutureWarning):
        told(libraries[0].deep)


def test_our_own_function_is_ours_whoever_calls_it(libraries):
    announcer, caller = libraries
    with pytest.raises(FutureWarning):
        told(lambda: caller.apply(lambda: announcer.old()))
    with pytest.raises(UserWarning, match="ours"):
        told(lambda: caller.apply(lambda: warnings.warn("ours", stacklevel=1)))


def test_a_warning_that_the_test_expects_is_not_raised(libraries):
    with pytest.warns(FutureWarning):
        libraries[0].old()


def test_every_test_runs_under_the_rule(libraries):
    with pytest.raises(FutureWarning):
        libraries[0].old()
    libraries[1].use()
