"""A gateway in a process of its own, to be killed: `python -m tests.unit.ledger_gateway SPILL FLUSH_S [writer URL]`.

Prints the front's port once it answers.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from serving.config import FakeEngineConfig
from serving.metering.ledger import WRITER, Ledger
from serving.metering.settings import LedgerSettings
from tests.unit.test_gateway import rig


async def main() -> None:
    directory, flush_s, *writer = sys.argv[1:]
    url = writer[0] if writer else "sqlite:///unused.db"
    told = LedgerSettings(url, Path(directory), float(flush_s), 2**24)
    ledger = Ledger(told, "killed", program=WRITER if writer else None)
    ledger.start()
    async with rig(FakeEngineConfig(decode_ms=1), ledger=ledger) as made:
        print(made.http.base_url.port, flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
