# SPDX-License-Identifier: Apache-2.0
"""Pin what is installed: the versions that the tests ran with, for those who install next.

    python tools/pin_versions.py constraints.txt          rewrite the pins of this Python
    python tools/pin_versions.py constraints.txt --check  say what differs; exit 1 if any does

In: the packages of the environment that runs this, and the constraints file as it is. Out: the file
with one line a package, and a marker where Python 3.11 and later ones differ (jax ends at 0.10.2 on
3.11). Packages of a CUDA build of torch are left out: torch names their versions itself. Not here:
installing, and testing that the versions work (Makefile).
"""

import re
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

OLD, NEW = 'python_version < "3.12"', 'python_version >= "3.12"'
LEFT_OUT = re.compile(r"dsjax|pip|setuptools|wheel|triton|(nvidia|cuda)-.*")
HEAD = """\
# The versions that the tests ran with. Made by `make update`, which tests the newest first.
"""
PIN = re.compile(r"(?P<name>[\w.-]+)==(?P<version>[\w.!+-]+)(?: ; (?P<marker>.+))?")

Pins = dict[str, str]


def main(words: Sequence[str]) -> int:
    """Rewrite the file, or compare it with what is installed."""
    file, check = Path(words[0]), "--check" in words[1:]
    sides = read_pins(file.read_text() if file.is_file() else "")
    mine = NEW if sys.version_info >= (3, 12) else OLD
    installed = installed_pins()
    if check:
        lines = differences(sides[mine], installed)
        print("\n".join(lines) or f"all {len(installed)} packages are the pinned ones")
        return 1 if lines else 0
    file.write_text(pins_text(sides | {mine: installed}))
    return 0


def installed_pins() -> Pins:
    """Name -> version of every package here, local builds (`+cpu`) as the version they are of."""
    found = {
        re.sub(r"[-_.]+", "-", one.metadata["Name"]).lower(): one.version.partition("+")[0]
        for one in metadata.distributions()
    }
    return {name: found[name] for name in sorted(found) if not LEFT_OUT.fullmatch(name)}


def read_pins(text: str) -> dict[str, Pins]:
    """Return the pins of both sides of a constraints file, by marker."""
    sides: dict[str, Pins] = {OLD: {}, NEW: {}}
    for line in text.splitlines():
        found = PIN.fullmatch(line)
        if found:
            for side in [found["marker"]] if found["marker"] else sides:
                sides[side][found["name"]] = found["version"]
    return sides


def pins_text(sides: Mapping[str, Pins]) -> str:
    """Return a constraints file: a line without a marker where both sides have the same version."""
    lines = []
    for name in sorted(sides[OLD].keys() | sides[NEW].keys()):
        versions = {side: pins[name] for side, pins in sides.items() if name in pins}
        if len(versions) == 2 and len(set(versions.values())) == 1:
            lines.append(f"{name}=={versions[OLD]}")
        else:
            lines += [f"{name}=={version} ; {side}" for side, version in versions.items()]
    return HEAD + "\n".join(lines) + "\n"


def differences(pinned: Mapping[str, str], installed: Mapping[str, str]) -> list[str]:
    """Return a line for each package whose version is not the pinned one."""
    return [
        f"{name}: pinned {pinned.get(name, 'nowhere')}, installed {installed.get(name, 'nowhere')}"
        for name in sorted(pinned.keys() | installed.keys())
        if pinned.get(name) != installed.get(name)
    ]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
