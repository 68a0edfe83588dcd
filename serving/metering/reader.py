"""`python -m serving.metering.reader`: answers a gateway's questions about the ledger, in a process of its own.

A gateway imports no database's library, and a question that takes long must hold up no stream: so it has this process
while somebody asks. Standard input brings `{"url": …}` and then questions, a line each, the next one after the answer
to the last; its end means that nobody asks any more.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, Final

import msgspec
import sqlalchemy as sa

from serving.metering import store
from serving.metering.questions import Question, Reply, Sums

# Behind the gateway and what else computes on its machine.
NICE: Final = 10
_SUMS: Final = ("requests", "prompt_tokens", "cached_tokens", "completion_tokens", "estimated")


class Reader:
    """Questions to one database, one after the other."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._engine: sa.Engine | None = None

    def answer(self, question: Question) -> Reply:
        """The sums; a reply says what is wrong, never with a password. Raises nothing of the database's."""
        missing = store.missing_file(self._url)
        if missing is not None:
            # To connect would make it anew, and empty.
            return Reply(trouble="away", reason=f"there is no ledger at {missing}")
        try:
            rows = self._rows(question)
        except sa.exc.SQLAlchemyError as error:
            slow = store.took_too_long(error)
            return Reply(trouble="slow" if slow else "away", reason=f"{type(error).__name__}: {store.reason(error)}")
        if len(rows) > question.most_rows:
            return Reply(trouble="many")
        return Reply(sums=tuple(_sums(row) for row in rows))

    def close(self) -> None:
        """Let go of the database."""
        if self._engine is not None:
            self._engine.dispose()

    def _rows(self, question: Question) -> list[Mapping[str, Any]]:
        if self._engine is None:
            self._engine = store.connect(self._url)
        with self._engine.connect() as connection:
            store.bound(connection, question.within_s)
            if question.ended_before_s is not None and not store.is_begun(connection):
                # Its first writer is about to make it: nothing was ever billed.
                return []
            return store.totals(
                connection,
                question.by,
                tenant=question.tenant,
                since=datetime.fromtimestamp(question.since_s, UTC),
                until=datetime.fromtimestamp(question.until_s, UTC),
                models=question.models,
                ended_before_s=question.ended_before_s,
                limit=question.most_rows + 1,
            )


def _sums(row: Mapping[str, Any]) -> Sums:
    return msgspec.convert(
        {name: int(row[name]) for name in _SUMS}
        # A day is a date on PostgreSQL and a text on SQLite.
        | {name: str(row[name]) for name in ("day", "model", "key_id") if name in row},
        Sums,
    )


def serve(reader: Reader, read: Callable[[], bytes], write: Callable[[bytes], None]) -> None:
    """Answer until `read`, which gives a line, gives none."""
    decoder, encoder = msgspec.json.Decoder(Question), msgspec.json.Encoder()
    try:
        while line := read():
            write(encoder.encode(reader.answer(decoder.decode(line))) + b"\n")
    finally:
        reader.close()


def main() -> int:
    """The process; its exit status."""
    os.nice(NICE)
    told = json.loads(sys.stdin.buffer.readline())

    def write(line: bytes) -> None:
        sys.stdout.buffer.write(line)
        sys.stdout.buffer.flush()

    serve(Reader(told["url"]), sys.stdin.buffer.readline, write)
    return 0


if __name__ == "__main__":
    sys.exit(main())
