"""Runs clients' programs in this environment, one after the other: `runner.py CLIENT:CAPABILITY …`.

Prints a line of JSON for each, with what it found or how it failed; what the libraries print goes elsewhere.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import common

sys.path.insert(0, str(Path(__file__).parent))


def run(client: str, capability: str) -> dict[str, Any]:
    """What the program found; `refused_…` asks for what the server refuses, and says how the client tells it."""
    program = importlib.import_module(f"with_{client}")
    if not capability.startswith("refused_"):
        return dict(getattr(program, capability)())
    try:
        answer = program.ask(common.REFUSALS[capability.removeprefix("refused_")])
    except Exception as error:
        return dict(program.describe(error))
    raise AssertionError(f"it was answered: {answer!r}")


def main() -> None:
    for name in sys.argv[1:]:
        client, capability = name.split(":")
        started_s = time.monotonic()
        line: dict[str, Any] = {"client": client, "capability": capability}
        with contextlib.redirect_stdout(sys.stderr):
            try:
                line["found"] = run(client, capability)
            except Exception:
                line["failed"] = traceback.format_exc()[-4000:]
        line["took_s"] = round(time.monotonic() - started_s, 2)
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
