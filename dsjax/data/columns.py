# SPDX-License-Identifier: Apache-2.0
"""`data.column_mapping`: the names of the user's columns -> the names that formats know.

In: rows as they were read. Out: the same rows under our names. Not here: what the columns mean
(`formats`).
"""

from collections.abc import Mapping
from typing import Any

from dsjax.data.formats import FORMATS, OPTIONAL
from dsjax.errors import ConfigError, nearest, raise_all

COLUMNS = tuple(
    dict.fromkeys(key for name, (keys, _) in FORMATS.items() for key in (*keys, *OPTIONAL[name]))
)


class Columns:
    """A mapping at work: `{ours: theirs}`; it notes which columns the rows have.

    Raises:
      ConfigError: a name before the colon is none of ours.
    """

    def __init__(self, mapping: Mapping[str, str]) -> None:
        self._mapping, self._theirs = mapping, set(mapping.values())
        self._seen: set[str] = set()
        raise_all(_unknown(ours, theirs) for ours, theirs in mapping.items() if ours not in COLUMNS)

    def rename(self, fields: dict[str, Any], origin: str) -> dict[str, Any]:
        """Return a row under our names; columns that are not mapped keep theirs."""
        if not self._mapping:
            return fields
        self._seen.update(fields)
        taken = {ours: fields[name] for ours, name in self._mapping.items() if name in fields}
        rest = {key: value for key, value in fields.items() if key not in self._theirs}
        both = next((ours for ours in taken if rest.get(ours) is not None), None)
        if both is not None:
            theirs = self._mapping[both]
            raise ConfigError(
                f"{origin}: got {both} and {theirs}, expected one of them, for data.column_mapping "
                f"reads {both} from {theirs}; to read {both} itself, take `{both}: {theirs}` out "
                f"of data.column_mapping; to read {theirs}, remove the column {both} from the data"
            )
        return rest | taken

    def problems(self) -> list[str]:
        """Return a line for each column that no row had so far."""
        return [
            f"data.column_mapping: got {theirs} for {ours}, which no row has, expected a column; "
            f"{nearest(theirs, self._seen)}"
            for ours, theirs in self._mapping.items()
            if theirs not in self._seen
        ]


def _unknown(ours: str, theirs: str) -> str:
    fix = f"write {theirs}: {ours}" if theirs in COLUMNS else nearest(ours, COLUMNS)
    return (
        f"data.column_mapping: got {ours}: {theirs}, expected one of {', '.join(COLUMNS)} before "
        f"the colon and the name in the data after it; {fix}"
    )
