# SPDX-License-Identifier: Apache-2.0
"""Warnings that are ours are errors; what a library says of another library is not.

In: a warning as it is raised, with the stack that led to it. Out: an error if our code raised it,
or called what announced it; else the record that pytest prints. A filter by module cannot tell:
transformers warns in its own file of a call that PEFT made, and in the same file of a call of ours.
"""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).resolve().parent.parent
OURS = tuple(str(ROOT / folder) + "/" for folder in ("dsjax", "tests", "tools", "benchmarks"))
SITE_PACKAGES = "/site-packages/"
CALL_MACHINERY = ("torch",)
"""Packages whose frames stand between a caller and the method of a module that it calls."""


@contextmanager
def raise_ours() -> Iterator[None]:
    """Raise every warning of this block that is ours, and show the others as before."""
    show = warnings.showwarning

    def raise_or_show(message, category, filename, lineno, file=None, line=None) -> None:
        if filename.startswith(OURS) or _called_by_us(sys._getframe(1)):
            raise message
        show(message, category, filename, lineno, file, line)

    warnings.showwarning = raise_or_show
    try:
        yield
    finally:
        warnings.showwarning = show


def _called_by_us(frame: FrameType | None) -> bool:
    """Whether the nearest frame outside the package that warns is one of ours."""
    warning_package = None
    while frame is not None:
        file = frame.f_code.co_filename
        frame = frame.f_back
        if file.startswith(OURS):
            return True
        package = _package(file)
        if package is None or package in CALL_MACHINERY:
            continue
        if warning_package not in (None, package):
            return False
        warning_package = package
    return False


def _package(file: str) -> str | None:
    """The installed package that a file is of; None for the standard library and made-up files."""
    _, found, inside = file.rpartition(SITE_PACKAGES)
    return inside.partition("/")[0].removesuffix(".py") if found else None
