# SPDX-License-Identifier: Apache-2.0
"""The rules of the house that a machine can check: arrows, sizes, names, knobs that are read."""

import ast
import functools
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import get_args

import pytest

from dsjax.config import RunConfig, load_config, rules

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "dsjax"

# A room, or a door (a file beside the rooms), imports from the rows above its own only.
ROOMS = (
    {"signals"},
    {"errors"},
    {"config"},
    {"buckets"},
    {"distributed", "data"},
    {"models"},
    {"adapters"},
    {"weights"},
    {"objectives"},
    {"decoding"},
    {"training"},
    {"export", "plan"},
    {"pretrained"},
    {"generate"},
    {"train", "evaluate"},
    {"view"},
)
ENTRY_POINTS = {"train.py", "evaluate.py", "plan/__main__.py"} | {
    f"{room}/command.py" for room in ("export", "generate", "plan", "view")
}
MOST_LINES = {"_train": 100}
"""Of a function; 60 of those that are not named here."""
VAGUE_NAMES = {"utils", "common", "helpers", "base", "core"}

SOURCES = sorted(path for folder in ("dsjax", "tools") for path in (ROOT / folder).rglob("*.py"))
ALL_PYTHON = sorted(
    [*SOURCES, *(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
)


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@functools.cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def _room(path: Path) -> str:
    """Name the room that a file of the package is in, or the door that it is."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def _imports(tree: ast.AST) -> list[str]:
    """List the dotted names that a file imports, also inside functions."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def _tracked() -> list[Path]:
    """List the files that are, or would be, part of the repository."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    files = [ROOT / name for name in listing.stdout.split("\0") if name]
    return [file for file in files if file.is_file()]


def test_the_house_has_these_rooms():
    found = {_room(path) for path in PACKAGE.rglob("*.py")} - {"__init__"}
    assert found == set().union(*ROOMS)


def test_imports_point_one_way():
    rank = {name: row for row, names in enumerate(ROOMS) for name in names}
    arrows = [
        (path, name.split(".")[1])
        for path in PACKAGE.rglob("*.py")
        for name in _imports(_tree(path))
        if name.startswith("dsjax.") and _room(path) not in ("__init__", name.split(".")[1])
    ]
    assert len(arrows) > 100
    back = [(_name(path), other) for path, other in arrows if rank[other] >= rank[_room(path)]]
    assert back == []


def test_no_room_has_a_circle():
    """Inside a room as well there is an order in which its files can be read.

    The package's own face is no part of it: it imports nothing before it is asked for.
    """
    files = {_dotted(path): path for path in PACKAGE.rglob("*.py")}
    del files["dsjax"]
    imported = {
        name: {_home(other, files) for other in _imports(_tree(path))} - {name, None}
        for name, path in files.items()
    }
    while imported:
        first = {name for name, others in imported.items() if not others & imported.keys()}
        assert first, f"these import one another: {sorted(imported)}"
        imported = {name: others for name, others in imported.items() if name not in first}


def _dotted(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _home(name: str, files: Mapping[str, Path]) -> str | None:
    """The file that an imported name is in; a room's face only where the face itself has it."""
    return name if name in files else name.rpartition(".")[0] if "." in name else None


@pytest.mark.parametrize("path", ALL_PYTHON, ids=_name)
def test_files_are_small_and_say_what_they_are(path: Path):
    text, tree = path.read_text(), _tree(path)
    assert text.startswith("# SPDX-License-Identifier: Apache-2.0\n")
    assert ast.get_docstring(tree), "no module docstring"
    assert len(text.splitlines()) <= 400
    assert path.stem not in VAGUE_NAMES and not VAGUE_NAMES & set(path.relative_to(ROOT).parts)
    long = [
        f"{node.name}: {node.end_lineno - node.lineno + 1} lines"
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and (node.end_lineno or 0) - node.lineno >= MOST_LINES.get(node.name, 60)
    ]
    assert long == []


def test_nothing_is_left_for_later():
    # Put together here, so that this file does not contain them.
    words = ["TO" + "DO", "FIX" + "ME", "type: " + "ignore", "mark." + "skip", "pytest." + "skip"]
    words += ["x" + "fail", "from __future__ " + "import annotations"]
    texts = {path: path.read_text() for path in ALL_PYTHON}
    found = [(_name(path), word) for path in texts for word in words if word in texts[path]]
    assert found == []


def test_torch_is_imported_only_where_it_is_used():
    imported = [
        (_name(path), name)
        for path in SOURCES
        for node in _tree(path).body
        if not isinstance(node, ast.FunctionDef)
        for name in _imports(node)
    ]
    assert len(imported) > 1000
    assert [found for found in imported if found[1].split(".")[0] == "torch"] == []


def test_only_commands_read_the_environment():
    reads = r"os\.(?:environ|getenv)|import environ|import getenv"
    readers = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if re.search(reads, path.read_text())
    }
    assert readers - ENTRY_POINTS == set()


def test_every_key_of_the_configuration_is_read():
    files = [path for path in PACKAGE.rglob("*.py") if _room(path) != "config"]
    text = "\n".join(path.read_text() for path in files)
    fields = {
        key: field.annotation
        for section in rules.sections(RunConfig).values()
        for key, field in section.model_fields.items()
    }
    # A key that can have one value only, until there is code for others, decides nothing.
    decided = {
        key for key, kind in fields.items() if len(get_args(kind)) == 1 or kind is type(None)
    }
    unread = [key for key in fields if not re.search(rf'\.{key}\b|"{key}"', text)]
    assert [key for key in unread if key not in decided] == []


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=_name)
def test_recipes_are_valid(path: Path):
    assert load_config(path).output_dir


def test_no_package_registry_is_named():
    hosts = ["py" + "pi", "python" + "hosted", "npm" + "js", "crates" + ".io", "ana" + "conda"]
    hosts += ["download." + "pytorch"]
    named = [
        f"{_name(path)}: {host}"
        for path in _tracked()
        for host in hosts
        if host.encode() in path.read_bytes().lower()
    ]
    assert named == []


def test_importing_the_package_starts_nothing():
    heavy = {"jax", "torch", "transformers", "datasets"}
    code = f"import sys, dsjax, dsjax.config; print(*{heavy} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == ""


# ---- Names: nothing is imported, for that takes long; what a module defines is read in its text.

PATCHES = ("setattr", "delattr")
DOTTED = r"dsjax(\.[A-Za-z_]\w*)+"


@functools.cache
def _defined(module: str) -> dict[str, ast.AST]:
    """Map the names that a module or package of dsjax has to what defines them."""
    path = ROOT.joinpath(*module.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    if not file.is_file():
        return {}
    names = _bindings(_tree(file).body)
    if path.is_dir():
        inside = [p for p in path.iterdir() if p.suffix == ".py" or (p / "__init__.py").is_file()]
        names = {p.stem: ast.Module([], []) for p in inside} | names
    return {"__doc__": ast.Module([], []), **names}


def _bindings(body: Sequence[ast.stmt]) -> dict[str, ast.AST]:
    """Map the names that statements bind, those inside `if`, `try` and `with` included."""
    names: dict[str, ast.AST] = {}
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names[node.name] = node
        elif isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                names[alias.asname or alias.name.split(".")[0]] = node
        else:
            stored = [n for n in ast.walk(node) if isinstance(n, ast.Name)]
            names |= {n.id: n for n in stored if isinstance(n.ctx, ast.Store)}
            for field in ("body", "orelse", "handlers", "finalbody"):
                names |= _bindings(getattr(node, field, []))
    return names


@functools.cache
def _exists(name: str) -> bool:
    """Tell whether a dotted name is a module of dsjax, something in one, or in a class there."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        defined, rest = _defined(".".join(parts[:count])), parts[count:]
        if defined and not rest:
            return True
        if defined:
            node = defined.get(rest[0])
            if isinstance(node, ast.ClassDef) and rest[1:] and not node.bases:
                own = {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)}
                return rest[1] in own | set(_bindings(node.body))
            return node is not None
    return False


def _trees(tree: ast.AST) -> list[ast.AST]:
    """List the tree of a file and those of the strings in it that are code which imports dsjax."""
    trees = [tree]
    for node in ast.walk(tree):
        text = ""
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            text = node.value
        elif isinstance(node, ast.JoinedStr):
            text = "".join(v.value if isinstance(v, ast.Constant) else "0" for v in node.values)
        if "dsjax" in text and "import" in text:
            with suppress(SyntaxError):  # prose
                trees.append(ast.parse(textwrap.dedent(text)))
    return trees


def _wanted(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield the dotted names of dsjax that a tree counts on, with their lines."""
    modules: dict[str, str] = {}
    nodes = list(ast.walk(tree))
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "dsjax":
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield node.lineno, name
                if _defined(name):
                    modules[alias.asname or alias.name] = name
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "dsjax":
                    yield node.lineno, alias.name
                    modules |= {alias.asname: alias.name} if alias.asname else {"dsjax": "dsjax"}
    # A name that is something else in places says nothing.
    others = {n.arg for n in nodes if isinstance(n, ast.arg)}
    others |= {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    modules = {name: module for name, module in modules.items() if name not in others}

    def dotted(node: ast.expr) -> str | None:
        if isinstance(node, ast.Name):
            return modules.get(node.id)
        inner = dotted(node.value) if isinstance(node, ast.Attribute) else None
        return f"{inner}.{node.attr}" if inner and isinstance(node, ast.Attribute) else None

    for node in nodes:
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            name = dotted(node)
            if name and isinstance(node.ctx, ast.Load):
                yield node.lineno, name
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            target = dotted(node.args[0]) if node.func.attr in PATCHES and node.args[1:] else None
            attribute = node.args[1] if target else None
            if isinstance(attribute, ast.Constant) and "raising" not in {
                k.arg for k in node.keywords
            }:
                yield node.lineno, f"{target}.{attribute.value}"
        elif isinstance(node, ast.Tuple):  # (module, class or nothing, function)
            parts = [e.value for e in node.elts if isinstance(e, ast.Constant)]
            if len(parts) == len(node.elts) == 3 and str(parts[0]).startswith("dsjax."):
                yield node.lineno, ".".join(str(part) for part in parts if part)
        elif isinstance(node, ast.Constant) and re.fullmatch(DOTTED, str(node.value)):
            yield node.lineno, str(node.value)


def test_names_of_the_package_exist():
    """Those that are imported, used, patched or written in strings of code."""
    found = [
        (f"{_name(path)}:{line}", name)
        for path in ALL_PYTHON
        for tree in _trees(_tree(path))
        for line, name in _wanted(tree)
    ]
    assert len(found) > 3000
    assert [pair for pair in found if not _exists(pair[1])] == []
