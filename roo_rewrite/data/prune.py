"""Filters on requests: which row groups cannot hold a match, and which rows are one.

A row group is passed over where its bounds contradict the filter. Bounds are statistics of columns with a total
order: of floats they leave NaN out, which `x != 1` keeps, so floats (and nested columns) never prune.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from pyarrow.fs import LocalFileSystem

from roo_rewrite.data import hive
from roo_rewrite.data.nest import plain_type
from roo_rewrite.data.source import opening
from roo_rewrite.data.store import PartMeta
from roo_rewrite.data.table import Columns
from roo_rewrite.errors import DataError

Filters: TypeAlias = "pc.Expression | Sequence[Any]"


@dataclass(frozen=True)
class RequestFilter:
    """A filter on request columns. `names`: those it reads."""

    expression: pc.Expression
    names: tuple[str, ...]
    schema: pa.Schema

    def rows(self, table: pa.Table) -> pa.Table:
        """The requests that match; as in SQL, one for which the filter is null does not."""
        return table.filter(self.expression)

    def row_groups(self, parts: Sequence[tuple[str, PartMeta]]) -> list[list[int]]:
        """Per part, the row groups that may hold a match; reads the footers only."""
        keys, bounds = [], []
        for p, (path, meta) in enumerate(parts):
            with opening(path) as file:
                for g in range(meta.row_groups):
                    keys.append((p, g))
                    bounds.append(self._bounds(file.metadata.row_group(g), meta))
        hints = ds.FileSystemDataset.from_paths(
            [str(i) for i in range(len(keys))],
            schema=self.schema,
            format=ds.ParquetFileFormat(),
            filesystem=LocalFileSystem(),
            partitions=bounds,
        )
        kept = sorted(int(f.path) for f in hints.get_fragments(self.expression))
        found: list[list[int]] = [[] for _ in parts]
        for p, g in (keys[i] for i in kept):
            found[p].append(g)
        return found

    def _bounds(self, group: pq.RowGroupMetaData, meta: PartMeta) -> pc.Expression:
        """What is true of every row of the group."""
        known = pc.scalar(True)
        for name, text in meta.partition.items():
            column, kind = pc.field(name), self.schema.field(name).type
            known = known & (pc.is_null(column) if text is None else column == pc.scalar(hive.value(text, kind)))
        leaves = [group.column(i) for i in range(group.num_columns)]
        for name in self.names:
            mine = [leaf for leaf in leaves if leaf.path_in_schema == name]
            if len(mine) == 1 and _is_ordered(self.schema.field(name).type):
                bound = _bound(pc.field(name), mine[0].statistics, self.schema.field(name).type)
                known = known if bound is None else known & bound
        return known


def _is_ordered(kind: pa.DataType) -> bool:
    text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    return bool(text or pa.types.is_integer(kind) or pa.types.is_date(kind) or pa.types.is_timestamp(kind))


def _bound(column: pc.Expression, found: pq.Statistics | None, kind: pa.DataType) -> pc.Expression | None:
    """`least <= column <= most`, or null where there may be nulls."""
    if found is None:
        return None
    if found.has_null_count and found.null_count and not found.num_values:
        return pc.is_null(column)
    if not found.has_min_max:
        return None
    nanos = pa.types.is_timestamp(kind) and kind.unit == "ns"
    ends = (found.min_raw, found.max_raw) if nanos else (found.min, found.max)
    least, most = (pc.scalar(pa.scalar(end, kind)) for end in ends)
    within = (column >= least) & (column <= most)
    return within if found.has_null_count and found.null_count == 0 else within | pc.is_null(column)


def request_filter(filters: Filters, columns: Columns) -> RequestFilter:
    """`filters`, a pyarrow expression or lists of (column, operator, value), checked against the columns.

    Raises DataError where it is no filter, names columns there are not, or impression columns.
    """
    sides = (*columns.request, *columns.impression)
    schema = pa.schema([pa.field(n, plain_type(columns.schema.field(n).type)) for n in sides])
    try:
        expression = filters if isinstance(filters, pc.Expression) else pq.filters_to_expression(list(filters))
        if "FieldPath(" in str(expression):
            raise DataError(f"filters must name their columns, not number them: {expression}")
        schema.empty_table().filter(expression)
    except (pa.ArrowException, ValueError, TypeError, OverflowError) as e:
        reason = str(e).partition(" in ")[0]
        raise DataError(f"filters do not fit: {reason}. The request columns are {', '.join(columns.request)}") from e
    names = tuple(n for n in schema.names if not _binds(expression, schema, n))
    inside = [n for n in names if n in columns.impression]
    if inside:
        raise DataError(
            f"filters choose requests, and {inside} are impression columns; filter by {', '.join(columns.request)}, "
            "or give the impressions not wanted a weight of 0"
        )
    return RequestFilter(expression, names, schema)


def _binds(expression: pc.Expression, schema: pa.Schema, without: str) -> bool:
    try:
        schema.remove(schema.get_field_index(without)).empty_table().filter(expression)
    except pa.ArrowException:
        return False
    return True
