"""The layout of a request-level data set, and its metadata.

    request_id, user_id, ...            request columns, once
    hist#new, hist#len                  a history column, as what it adds to the row before (see history.py)
    impressions: list<struct<...>>      the rest, one struct per impression

A partition column is not in the files but in the names of their directories (see hive.py).

List of struct, not parallel lists: the bytes are the same to 0.1%, and lists that must have one length cannot
differ in it.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from roo_rewrite.errors import DataError, SpecError
from roo_rewrite.features import FeatureSpec, matches

FORMAT = 1
MANIFEST = "_roo.json"
IMPRESSIONS = "impressions"
POSITION = "__position"
META_KEY = b"roo"


@dataclass(frozen=True)
class Columns:
    """Which column of a log lies where. `schema` is the log's own.

    position: each impression's row number is kept. partition: the column that names the parts' directories.
    """

    request_id: str
    request: tuple[str, ...]
    impression: tuple[str, ...]
    schema: pa.Schema
    user: str | None = None
    time: str | None = None
    position: bool = True
    partition: str | None = None

    @property
    def fields(self) -> tuple[str, ...]:
        """Fields of the impression struct."""
        return (*self.impression, POSITION) if self.position else self.impression

    def demote(self, names: Sequence[str]) -> Columns:
        """The columns `names` on the impression side."""
        kept = tuple(c for c in self.request if c not in names)
        return replace(self, request=kept, impression=(*self.impression, *names))

    def to_dict(self) -> dict[str, Any]:
        """JSON values; the schema as base64 of Arrow IPC."""
        plain = asdict(self, dict_factory=lambda items: {k: v for k, v in items if k != "schema"})
        return {**plain, "schema": base64.b64encode(self.schema.serialize().to_pybytes()).decode()}

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> Columns:
        """Inverse of `to_dict`."""
        schema = pa.ipc.read_schema(pa.py_buffer(base64.b64decode(plain["schema"])))
        lists = {k: tuple(plain[k]) for k in ("request", "impression")}
        return cls(**{**plain, **lists, "schema": schema})


def assign(
    schema: pa.Schema,
    spec: FeatureSpec,
    request_id: str,
    user: str | None = None,
    time: str | None = None,
    position: bool = True,
    partition: str | None = None,
) -> Columns:
    """The side of every column. A pattern that names no column is for the model, not the log, and is passed over.

    Raises DataError where the id is missing or of a type that cannot be one, SpecError where a column is on
    no side or on both.
    """
    for what, name in (("request id", request_id), ("user id", user), ("time", time), ("partition", partition)):
        if name is not None and name not in schema.names:
            raise DataError(f"there is no {what} column {name!r}; the columns are {', '.join(schema.names)}")
    kind = schema.field(request_id).type
    if not (pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise DataError(f"column {request_id!r} is {kind}; a request id must be an integer or a string")
    reserved = [n for n in schema.names if n in (IMPRESSIONS, POSITION) or n.endswith(("#new", "#len"))]
    if reserved:
        raise DataError(f"these column names are the storage format's own; rename them first: {reserved}")
    names = [n for n in schema.names if n != request_id]
    asked = {
        side: {n for p in patterns for n in matches(p, names)}
        for side, patterns in (("request", spec.request), ("impression", spec.impression))
    }
    nowhere = [n for n in names if n not in asked["request"] | asked["impression"]]
    both = sorted(asked["request"] & asked["impression"])
    if nowhere or both:
        problems = [f"{n!r} is not assigned to a side" for n in nowhere] + [f"{n!r} is on both sides" for n in both]
        raise SpecError("the feature spec does not fit the log's columns:\n  " + "\n  ".join(problems))
    request = (request_id, *(n for n in names if n in asked["request"]))
    late = [n for n in (user, time, partition) if n is not None and n not in request]
    if late:
        raise SpecError(f"{late} order the requests, so they must be request columns in the spec")
    if partition == request_id:
        raise DataError("a partition for every request is too many; partition by a coarser column")
    impression = tuple(n for n in names if n in asked["impression"])
    return Columns(request_id, request, impression, schema, user, time, position or not impression, partition)


@dataclass(frozen=True)
class Part:
    """One file of a data set, relative to its directory."""

    path: str
    requests: int
    impressions: int
    bytes: int


@dataclass(frozen=True)
class Manifest:
    """What a data set is: the only file readers trust, replaced in one step."""

    columns: Columns
    parts: tuple[Part, ...]
    spec: dict[str, Any]
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def requests(self) -> int:
        """Requests in all parts."""
        return sum(p.requests for p in self.parts)

    @property
    def impressions(self) -> int:
        """Impressions in all parts."""
        return sum(p.impressions for p in self.parts)

    def write(self, folder: Path) -> None:
        """Replaces the manifest in `folder`, wholly or not at all."""
        body = {
            "format": FORMAT,
            "requests": self.requests,
            "impressions": self.impressions,
            "columns": self.columns.to_dict(),
            "spec": self.spec,
            "provenance": self.provenance,
            "parts": [asdict(p) for p in self.parts],
        }
        write_whole(folder / MANIFEST, json.dumps(body, indent=1).encode(), durable=True)


def read_manifest(folder: str | Path) -> Manifest:
    """The manifest of the data set in `folder`. Raises DataError where there is none or it is not understood."""
    path = Path(folder) / MANIFEST
    try:
        body = json.loads(path.read_bytes())
        if body["format"] != FORMAT:
            raise DataError(f"{path} has format {body['format']}, this version reads {FORMAT}")
        parts = tuple(Part(**p) for p in body["parts"])
        return Manifest(Columns.from_dict(body["columns"]), parts, body["spec"], body["provenance"])
    except OSError as e:
        raise DataError(f"{folder} is no request-level data set: {path.name} is missing ({e.strerror})") from e
    except (ValueError, KeyError, TypeError) as e:
        raise DataError(f"{path} is damaged: {e}") from e


def write_whole(path: Path, content: bytes, durable: bool = False) -> None:
    """Writes a file so that a reader sees the old one or the new one; `durable`: also after a power cut."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as out:
        out.write(content)
        if durable:
            out.flush()
            os.fsync(out.fileno())
    os.replace(partial, path)
