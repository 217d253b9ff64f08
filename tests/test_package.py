# SPDX-License-Identifier: Apache-2.0
"""What is installed: every library that the package imports, no other; the files of its wheel."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterable, Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from dsjax.view.page import SCRIPTS

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
BY_STRING = {"beartype"}
"""Imported by jaxtyping's hook, which is given the name (tests/conftest.py)."""
PROGRAMS = {"ipykernel", "pytest-xdist", "ruff", "pyright"}
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


BUILD = "import sys\nfrom setuptools import build_meta\nbuild_meta.build_wheel(sys.argv[1])"


@pytest.mark.slow
def test_a_wheel_has_what_it_reads_and_no_tests(tmp_path: Path):
    source, target = tmp_path / "source", tmp_path / "installed"
    shutil.copytree(ROOT / "dsjax", source / "dsjax", symlinks=True)
    shutil.copytree(ROOT / "configs", source / "configs")
    for name in ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    subprocess.run(
        [sys.executable, "-c", BUILD, str(tmp_path)], cwd=source, capture_output=True, check=True
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    installed = {str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()}
    package = {name for name in installed if ".dist-info/" not in name}
    assert {name.split("/")[0] for name in package} == {"dsjax"}
    assert {Path(name).suffix for name in package} == {
        ".py",
        ".yaml",
        ".txtpb",
        ".html",
        ".css",
        ".js",
    }
    recipes = {path.name for path in (ROOT / "configs").glob("*.yaml")}
    assert {f"dsjax/config/recipes/{name}" for name in recipes} <= package
    targets = {path.name for path in (ROOT / "dsjax/plan/gpu_targets").iterdir()}
    assert {f"dsjax/plan/gpu_targets/{name}" for name in targets} <= package
    page = {f"dsjax/view/{name}" for name in ("page.html", "page.css", *SCRIPTS)}
    assert page <= package
    done = subprocess.run(
        [sys.executable, "-m", "dsjax.train", "--config", "quickstart.yaml"],
        cwd=target,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.endswith(f"is {target}/dsjax/config/recipes/quickstart.yaml\n")
