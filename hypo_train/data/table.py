"""The rows of a split with their columns: a ``datasets.Dataset``, or a list of dictionaries."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import datasets

Rows: TypeAlias = datasets.Dataset | Sequence[Mapping[str, Any]]


def column_names(rows: Rows) -> list[str]:
    """Return the names of all columns, in order; rows of a list may lack some of them."""
    if isinstance(rows, datasets.Dataset):
        return list(rows.column_names)
    return list(dict.fromkeys(name for row in rows for name in row))


def with_columns(rows: Rows, columns: Mapping[str, str]) -> Rows:
    """Return the rows with the columns that ``columns`` names, {name: new name}, and no others.

    Other columns are not read, so that no value in them can be a problem.
    """
    if isinstance(rows, datasets.Dataset):
        chosen = rows.select_columns(list(columns))
        return chosen.rename_columns({name: new for name, new in columns.items() if name != new})
    return [{new: row[name] for name, new in columns.items() if name in row} for row in rows]


def column(rows: Rows, name: str) -> list[Any]:
    """Return the values of one column; pictures and sound are not decoded."""
    if isinstance(rows, datasets.Dataset):
        values: list[Any] = rows.select_columns([name]).with_format("arrow")[:][name].to_pylist()
        return values
    return [row.get(name) for row in rows]


def part_of(rows: Rows, indices: range) -> Rows:
    """Return the rows at consecutive ``indices``."""
    if isinstance(rows, datasets.Dataset):
        return rows.select(indices)
    return rows[indices.start : indices.stop]


def joined(parts: Iterable[Rows]) -> Rows:
    """Return the rows of all parts, one after the other."""
    tables = list(parts)
    if len(tables) == 1:
        return tables[0]
    arrow = [table for table in tables if isinstance(table, datasets.Dataset)]
    if len(arrow) == len(tables) and all(table.features == arrow[0].features for table in arrow):
        return datasets.concatenate_datasets(arrow)
    return [row for table in tables for row in table]


def spread(rows: Rows, count: int) -> Rows:
    """Return about ``count`` rows, evenly spread, or all if there are fewer."""
    indices = range(0, len(rows), max(1, len(rows) // count))
    return rows.select(indices) if isinstance(rows, datasets.Dataset) else [rows[index] for index in indices]
