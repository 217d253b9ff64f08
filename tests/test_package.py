# SPDX-License-Identifier: Apache-2.0
"""What is installed with the package: every library that it imports, and none that it does not."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterable, Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
BY_STRING = {"beartype"}
"""Imported by jaxtyping's hook, which is given the name (tests/conftest.py)."""
PROGRAMS = {"pytest-xdist", "ruff", "pyright"}
"""Run by the Makefile, not imported."""


def _normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _declared(requirements: Iterable[str]) -> set[str]:
    """Name the distributions of requirements, without extras and versions."""
    return {_normalized(re.split(r"[^\w.-]", line, maxsplit=1)[0]) for line in requirements}


def _imported(*folders: str) -> set[str]:
    """Name the distributions of what the files of these folders import, at any depth."""
    files = [path for folder in folders for path in _files(folder)]
    scripts = [path for folder in ("tools", "tests", "benchmarks") for path in _files(folder)]
    ours = {"dsjax"} | {path.stem for path in scripts}
    names = {name for path in files for name in _top_names(path)} - ours - sys.stdlib_module_names
    found = packages_distributions()
    return {_normalized(owner) for name in names for owner in found.get(name, [name])}


def _files(folder: str) -> list[Path]:
    return list((ROOT / folder).rglob("*.py"))


def _top_names(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield str(node.module).split(".")[0]


DEPENDENCIES = _declared(PROJECT["dependencies"])
FOR_TESTS = _declared(PROJECT["optional-dependencies"]["test"])


def test_what_the_package_imports_is_declared_and_nothing_else():
    # torch reads a checkpoint's .bin files; who has none does not need it, and a message says so.
    assert _imported("dsjax", "tools") - {"torch"} == DEPENDENCIES


def test_what_tests_and_benchmarks_import_is_declared_and_nothing_else():
    imported = _imported("tests", "benchmarks") | BY_STRING
    assert imported - DEPENDENCIES == FOR_TESTS - DEPENDENCIES - PROGRAMS


def test_the_pinned_versions_are_those_of_declared_libraries():
    pins = {
        _normalized(line.split("==")[0])
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    assert (DEPENDENCIES | FOR_TESTS) - pins == set()
