"""A run as a file: what a report can be made from again, and runs of different days compared by.

JSON, compressed where the name ends in .gz. Records are rows, to keep an hour of load small enough to send around.
"""

from __future__ import annotations

import gzip
import json
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from loadtest.client import FailureKind
from loadtest.errors import LoadtestError
from loadtest.records import Outcome, Record
from loadtest.reports.model import ReplicaCount, ReportRun, SloTarget

FORMAT = "galerne-loadtest-run"
VERSION = 1
_FIELDS = tuple(Record.__dataclass_fields__)
# A microsecond: finer than any clock of a network.
_DECIMALS = 6


def save(run: ReportRun, path: Path) -> None:
    """Write the run, whole or not at all. Raises LoadtestError where it cannot be written."""
    document = {
        "format": FORMAT,
        "version": VERSION,
        "name": run.name,
        "when": run.when.isoformat(),
        "simulated": run.simulated,
        "invalid": list(run.invalid),
        "machine": dict(run.machine),
        "scenario": dict(run.scenario),
        "slo": [asdict(target) for target in run.slo],
        "replicas": [[count.t_s, count.model, count.count] for count in run.replicas],
        "fields": list(_FIELDS),
        "records": [_row(record) for record in run.records],
    }
    raw = json.dumps(document, separators=(",", ":")).encode()
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(gzip.compress(raw, mtime=0) if path.suffix == ".gz" else raw)
        partial.replace(path)
    except OSError as problem:
        raise LoadtestError(f"{path}: cannot be written: {problem.strerror}") from problem


def load(path: Path) -> ReportRun:
    """The run in the file. Raises LoadtestError for a file that is none."""
    try:
        raw = path.read_bytes()
        document = json.loads(gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw)
    except OSError as problem:
        raise LoadtestError(f"{path}: cannot be read: {problem.strerror or problem}") from problem
    except (ValueError, EOFError) as problem:
        raise LoadtestError(f"{path}: not the file of a run: {problem}") from problem
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise LoadtestError(f"{path}: not the file of a run; give a run.json.gz that `loadtest run` wrote")
    if document.get("version") != VERSION:
        raise LoadtestError(f"{path}: version {document.get('version')} of the format; this tool reads {VERSION}")
    try:
        return _run(document)
    except (KeyError, TypeError, ValueError) as problem:
        raise LoadtestError(f"{path}: the file of a run, but damaged: {problem!r}") from problem


def _run(document: dict[str, Any]) -> ReportRun:
    fields = document["fields"]
    return ReportRun(
        name=document["name"],
        when=datetime.fromisoformat(document["when"]),
        machine=document["machine"],
        scenario=document["scenario"],
        records=[_record(dict(zip(fields, row, strict=True))) for row in document["records"]],
        simulated=document["simulated"],
        slo=[SloTarget(**target) for target in document["slo"]],
        replicas=[ReplicaCount(*row) for row in document["replicas"]],
        invalid=document["invalid"],
    )


def _row(record: Record) -> list[Any]:
    return [_plain(getattr(record, name)) for name in _FIELDS]


def _plain(value: Any) -> Any:
    match value:
        case bool() | None:
            return value
        case float():
            return round(value, _DECIMALS)
        case tuple():
            return [round(item, _DECIMALS) for item in value]
        case _:
            return value


def _record(held: dict[str, Any]) -> Record:
    held["chunks_s"] = tuple(held["chunks_s"])
    held["outcome"] = Outcome(held["outcome"])
    held["failure"] = None if held["failure"] is None else FailureKind(held["failure"])
    return Record(**held)
