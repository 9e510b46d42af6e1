"""The rows of a split with their columns: a ``datasets.Dataset``, or a list of dictionaries."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
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


def each_row(rows: Rows) -> Iterator[Mapping[str, Any]]:
    """Yield the rows, without the keys that Arrow filled in.

    A column of Arrow has one type, so each dictionary in it gets the keys of all others, with None as their value. A
    None that the data had cannot be told from these. The type ``Json`` of ``datasets`` keeps dictionaries as they are.
    """
    if isinstance(rows, datasets.Dataset):
        features = rows.features
        return ({name: _without_filled(value, features[name]) for name, value in row.items()} for row in rows)
    return iter(rows)


def _without_filled(value: Any, feature: Any) -> Any:
    inner = getattr(feature, "feature", feature[0] if isinstance(feature, list) else None)
    if isinstance(value, dict) and isinstance(feature, dict):
        return {key: _without_filled(item, feature[key]) for key, item in value.items() if item is not None}
    if isinstance(value, dict) and isinstance(inner, dict):  # a list of dictionaries that is stored as lists
        return {key: _without_filled(item, [inner[key]]) for key, item in value.items() if item is not None}
    if isinstance(value, list) and inner is not None:
        return [_without_filled(item, inner) for item in value]
    return value


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
    return [row for table in tables for row in each_row(table)]


def spread(rows: Rows, count: int) -> Rows:
    """Return about ``count`` rows, evenly spread, or all if there are fewer."""
    indices = range(0, len(rows), max(1, len(rows) // count))
    return rows.select(indices) if isinstance(rows, datasets.Dataset) else [rows[index] for index in indices]
