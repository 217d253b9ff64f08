# SPDX-License-Identifier: Apache-2.0
"""CSV files -> rows, each with the number of its line.

In: a path. Out: `(line, fields)` pairs, every field a string. Columns without a name are known for
what they are: before the first name the index that pandas writes, which is not read; after the last
name an empty one, from a comma at the end of the line. Not here: JSON inside a cell (`files`).
"""

import csv
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from dsjax.errors import ConfigError


def csv_rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Read the rows under a header; empty lines are passed over."""
    csv.field_size_limit(sys.maxsize)  # the default refuses texts of more than 131072 characters
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        header: _Header | None = None
        line = 1
        try:
            for cells in reader:
                if cells and header is None:
                    header = _Header(cells, f"{path}:{line}")
                elif cells and header is not None:
                    yield line, header.fields(cells, f"{path}:{line}")
                line = reader.line_num + 1
        except csv.Error as error:
            raise ConfigError(
                f"{path}:{line}: got a row that is not CSV ({error}), expected CSV with a header; "
                "double the quotes inside quoted cells"
            ) from error


class _Header:
    """The names of the columns, and which of the columns have one."""

    def __init__(self, cells: Sequence[str], origin: str) -> None:
        named = [index for index, name in enumerate(cells) if name]
        if not named:
            raise ConfigError(
                f"{origin}: got {len(cells)} columns without a name, expected a header"
            )
        self._cells = cells
        self._first, self._end = named[0], named[-1] + 1
        names = cells[self._first : self._end]
        if "" in names:
            raise ConfigError(
                f"{origin}: got no name for column {self._first + names.index('') + 1} of "
                f"{len(cells)}, expected a name for each between the first and the last that have "
                "one; name it, or remove the column"
            )
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ConfigError(
                f"{origin}: got the column {twice} twice, expected it once; rename one of them"
            )

    def fields(self, cells: Sequence[str], origin: str) -> dict[str, str]:
        """Name the cells of a row.

        Raises:
          ConfigError: there are more or fewer than the header has, or one that would be lost.
        """
        trailing = cells[self._end :]
        if not self._end <= len(cells) <= len(self._cells):
            raise ConfigError(
                f"{origin}: got {len(cells)} columns, expected {len(self._cells)} as in the "
                "header; quote cells that hold a comma or a line break"
            )
        if any(trailing):
            raise ConfigError(
                f"{origin}: got {next(filter(None, trailing))[:40]!r} in a column without a name, "
                f"expected nothing after column {self._end}; name the column in the header, or "
                "quote cells that hold a comma"
            )
        names = self._cells[self._first : self._end]
        return dict(zip(names, cells[self._first : self._end], strict=True))
