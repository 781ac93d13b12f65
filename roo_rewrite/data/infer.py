"""Which columns of a log are request-level, told from the data: constant within every request.

A column that is constant within every request of two or more impressions may be stored once per request. One
that is so in nearly all is reported with its violations. The same is told for users and sessions.
"""

from __future__ import annotations

import glob
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import tomli_w

from roo_rewrite.data.engines import DEFAULT_MEMORY
from roo_rewrite.data.plan import check_keys, duck_errors, duck_settings, quoted, texts
from roo_rewrite.data.source import Source, open_source
from roo_rewrite.data.table import assign, write_whole
from roo_rewrite.errors import DataError
from roo_rewrite.features import FeatureSpec

VARIES_SQL = """
SELECT count(*) FILTER (n > 1 AND low <> high), count(*) FILTER (n > 1)
FROM (SELECT key, count(*) AS n, min(code) AS low, max(code) AS high FROM
      (SELECT {key} AS key, {code} AS code FROM {log} WHERE {key} IS NOT NULL) GROUP BY key)
"""
EXAMPLES_SQL = """
SELECT key, low, high FROM (
    SELECT {key} AS key, arg_min(struct_pack(v := {column}), {code}).v AS low,
        arg_max(struct_pack(v := {column}), {code}).v AS high,
        min({code}) AS a, max({code}) AS b
    FROM {log} GROUP BY ALL HAVING a <> b) ORDER BY key LIMIT {limit}
"""


@dataclass(frozen=True)
class Level:
    """Groups of impressions by `column`: requests, sessions or users."""

    name: str
    column: str
    groups: int
    repeated: int


@dataclass(frozen=True)
class Facts:
    """One column: its bytes in memory, and per level in how many groups of two or more it varies."""

    name: str
    type: str
    bytes: int
    varies: dict[str, int]
    examples: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Inference:
    """What was found. `levels` starts with the request."""

    rows: int
    levels: tuple[Level, ...]
    columns: tuple[Facts, ...]
    request_id: str

    @property
    def spec(self) -> FeatureSpec:
        """Constant columns on the request side, the others on the impression side."""
        sides: dict[bool, list[str]] = {True: [], False: []}
        for c in self.columns:
            sides[c.varies["request"] == 0].append(glob.escape(c.name))
        return FeatureSpec(sides[True], sides[False])

    def share(self, column: Facts, level: Level) -> float:
        """Share of the level's groups of two or more in which the column varies."""
        return column.varies[level.name] / max(1, level.repeated)

    def saves(self, column: Facts, level: Level) -> int:
        """Bytes in memory saved by storing the column once per group, if it is constant there."""
        return 0 if column.varies[level.name] else round(column.bytes * (1 - level.groups / max(1, self.rows)))

    def nearly(self, limit: float) -> list[Facts]:
        """Columns that vary in some requests, but at most in `limit` of them."""
        return [c for c in self.columns if 0 < self.share(c, self.levels[0]) <= limit]

    def write(self, path: Path, limit: float = 0.05) -> None:
        """The spec as TOML, nearly constant columns as comments."""
        lines = [f"# {self.rows} impressions of {self.levels[0].groups} requests, grouped by {self.request_id!r}\n"]
        for column in self.nearly(limit):
            share = self.share(column, self.levels[0])
            lines.append(f"# nearly request-level: {column.name!r} varies in {share:.2%} of requests, e.g.\n")
            lines += [f"#   {' '.join(example.split())}\n" for example in column.examples]
        write_whole(path, ("".join(lines) + tomli_w.dumps(self.spec.to_dict())).encode())


def infer(
    data: str | Path,
    request_id: str,
    *,
    user: str | None = None,
    session: str | None = None,
    examples: int = 3,
    memory: int = DEFAULT_MEMORY,
) -> Inference:
    """Tells which columns of the Parquet log `data` are constant within requests (sessions, users).

    Reads one column at a time, within `memory` bytes. Raises DataError where ids are missing, or no request
    has two impressions and so nothing can be told.
    """
    source = open_source(data)
    if not source.rows:
        raise DataError(f"{data} has no rows; nothing can be told")
    everything = FeatureSpec(impression=["*"])
    columns = assign(source.schema, everything, request_id)
    for what, name in (("user", user), ("session", session)):
        if name is not None and name not in source.schema.names:
            raise DataError(f"there is no {what} column {name!r}; the columns are {', '.join(source.schema.names)}")
    with tempfile.TemporaryDirectory() as work, duckdb.connect(config=duck_settings(Path(work), memory)) as con:
        log = f"read_parquet({texts(source.files)})"
        keys = {"request": request_id, "session": session, "user": user}
        with duck_errors(source, f"{data} cannot be read"):
            levels = tuple(_level(con, log, name, key) for name, key in keys.items() if key is not None)
            check_keys(source, columns)
            if not levels[0].repeated:
                raise DataError(f"no request of {data} has two impressions, so nothing can be told; is the id right?")
            facts = tuple(_facts(con, log, source, name, levels, examples) for name in columns.impression)
    return Inference(source.rows, levels, facts, request_id)


def _level(con: Any, log: str, name: str, key: str) -> Level:
    counts = con.execute(
        f"SELECT count(*), count(*) FILTER (n > 1) FROM "
        f"(SELECT count(*) AS n FROM {log} WHERE {quoted(key)} IS NOT NULL GROUP BY {quoted(key)})"
    ).fetchone()
    return Level(name, key, int(counts[0]), int(counts[1]))


def _facts(con: Any, log: str, source: Source, name: str, levels: Sequence[Level], examples: int) -> Facts:
    varies: dict[str, int] = {}
    code = _code(name, source.schema.field(name).type)
    for level in levels:
        sql = VARIES_SQL.format(key=quoted(level.column), code=code, log=log)
        varies[level.name] = int(con.execute(sql).fetchone()[0])
    size = sum(u.widths[name] for u in source.units)
    shown: list[str] = []
    if varies["request"] and examples:
        sql = EXAMPLES_SQL.format(key=quoted(levels[0].column), column=quoted(name), code=code, log=log, limit=examples)
        shown = [f"{key!r}: {_short(a)} and {_short(b)}" for key, a, b in con.execute(sql).fetchall()]
    return Facts(name, str(source.schema.field(name).type), size, varies, shown)


def _code(name: str, kind: pa.DataType) -> str:
    """SQL of a 64-bit code of a value. DuckDB hashes `[]` and `[NULL]` alike, so lists add their length or text."""
    column = quoted(name)
    if not pa.types.is_nested(kind):
        return f"hash({column})"
    flat = (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and not pa.types.is_nested(kind.value_type)
    return f"hash({column}, {f'len({column})' if flat else f'{column}::VARCHAR'})"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
