"""A conversion's working directory: what a killed run leaves for the next, and how a result takes its place."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from roo_rewrite.data.table import MANIFEST, Manifest, read_manifest, write_whole
from roo_rewrite.errors import DataError

GENERATION = "data-"


@contextlib.contextmanager
def working(out: Path, job: dict[str, Any]) -> Iterator[Path]:
    """The directory for `job` beside `out`; kept when the process dies, and gone on to by the same job.

    On success and on an error it is removed: no partial output stays. On Ctrl-C it is kept. Raises
    DataError where another run is at work, and in place of an I/O error.
    """
    work = out.parent / f".{out.name}.roo-work"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        work.mkdir(exist_ok=True)
        with _locked(work, out):
            _resume_or_reset(work, job)
            try:
                yield work
            except KeyboardInterrupt:
                raise
            except BaseException:
                shutil.rmtree(work, ignore_errors=True)
                raise
            shutil.rmtree(work, ignore_errors=True)
    except (OSError, pa.ArrowException) as e:
        raise DataError(_explain(e, out)) from e


def _explain(error: BaseException, out: Path) -> str:
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if full or "No space left" in str(error) or "File too large" in str(error):
        return f"the disk of {out.parent} is full: {error}. Free room or write elsewhere; nothing was changed"
    return f"writing {out} failed: {error}. Nothing was changed"


@contextlib.contextmanager
def _locked(work: Path, out: Path) -> Iterator[None]:
    with open(work / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"another run is writing {out}; wait for it, or end it") from None
        yield


def _resume_or_reset(work: Path, job: dict[str, Any]) -> None:
    text = json.dumps([job, _boot()], sort_keys=True, default=str).encode()
    key = hashlib.sha256(text).hexdigest()
    marker = work / "job"
    if not marker.exists() or marker.read_text() != key:
        for child in work.iterdir():
            if child.name != "lock":
                shutil.rmtree(child) if child.is_dir() else child.unlink()
        write_whole(marker, key.encode())


def _boot() -> str:
    """Changes with every start of the machine: what a power cut may have left half on the disk is not gone on with."""
    note = Path("/proc/sys/kernel/random/boot_id")
    return note.read_text().strip() if note.exists() else ""


def sync(path: Path) -> None:
    """Onto the disk."""
    with open(path, "rb") as f:
        os.fsync(f.fileno())


def fingerprint(files: tuple[str, ...]) -> list[list[Any]]:
    """Name, size and time of change of every input."""
    stats = [(name, os.stat(name)) for name in files]
    return [[name, s.st_size, s.st_mtime_ns] for name, s in stats]


def check_target(out: Path) -> None:
    """Raises DataError where `out` holds something that is not a request-level data set."""
    if out.is_file():
        raise DataError(f"{out} is a file; a request-level data set is a directory")
    strange = [p.name for p in out.iterdir() if not _ours(p)] if out.is_dir() else []
    if strange:
        raise DataError(f"{out} holds other files ({', '.join(sorted(strange)[:3])}); give a new directory")


def _ours(path: Path) -> bool:
    return path.name.startswith((MANIFEST, GENERATION))


def next_generation(out: Path) -> str:
    """A name for the new parts in `out` that no other run, finished or killed, has used."""
    taken = [int(p.name.removeprefix(GENERATION)) for p in out.glob(GENERATION + "*")] if out.is_dir() else []
    return f"{GENERATION}{max(taken, default=0) + 1}"


def publish(work: Path, out: Path, manifest: Manifest, generation: str) -> None:
    """Moves `work/data` into `out` and replaces the manifest; then removes what the old one named.

    Killed before the manifest is replaced: the old data set. After: the new one.
    """
    out.mkdir(exist_ok=True)
    for part in (work / "data").rglob("*.parquet"):
        sync(part)
    if (work / "data").exists():
        (work / "data").rename(out / generation)
    manifest.write(out)
    for old in out.glob(GENERATION + "*"):
        if old.name != generation:
            shutil.rmtree(old, ignore_errors=True)


def open_parts(folder: str | Path) -> tuple[Manifest, list[str]]:
    """The manifest of a data set and the paths of its parts. Raises DataError where a part is missing."""
    manifest = read_manifest(folder)
    paths = [str(Path(folder) / p.path) for p in manifest.parts]
    missing = [p for p in paths if not os.path.exists(p)]
    if missing:
        raise DataError(f"{folder} lacks {len(missing)} of its {len(paths)} parts, first {missing[0]}")
    return manifest, paths
