"""Azure's public conversation trace of 2023: real times and real lengths of one production chat service.

CC-BY-4.0, from "Splitwise" (Patel et al., ISCA 2024). It holds no text: prompts are filler of the recorded
length, each different from the first token on, so a prefix cache finds nothing, as it knows nothing here.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from datetime import datetime
from functools import partial
from typing import ClassVar, Literal

from loadtest.errors import LoadtestError
from loadtest.workloads.draft import Draft, Setting, Workload

_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


class AzureWorkload(Workload):
    """One draft a row; `file` may name another trace of the same columns in the data folder."""

    timed: ClassVar[bool] = True

    kind: Literal["azure"]
    file: str = "azure2023_conv.csv"

    def drafts(self, setting: Setting) -> Iterator[Draft]:
        """The trace from its first row on. Raises LoadtestError with file and line for a row that is none."""
        path = setting.file(self.file)
        with path.open(encoding="utf-8", newline="") as file:
            rows = csv.DictReader(file)
            if missing := [name for name in _COLUMNS if name not in (rows.fieldnames or ())]:
                raise LoadtestError(f"{path}:1: no column {', '.join(missing)}; it needs {', '.join(_COLUMNS)}")
            first: datetime | None = None
            latest_s = 0.0
            for row in rows:
                try:
                    # Ten-millionths of a second; the parser keeps microseconds.
                    moment = datetime.fromisoformat(row["TIMESTAMP"])
                    prompt_tokens, output_tokens = int(row["ContextTokens"]), int(row["GeneratedTokens"])
                except (TypeError, ValueError) as error:
                    raise LoadtestError(f"{path}:{rows.line_num}: not a row of this trace: {error}") from error
                first = first or moment
                at_s = (moment - first).total_seconds()
                if at_s < latest_s:
                    raise LoadtestError(f"{path}:{rows.line_num}: earlier than the row before it; sort the file")
                latest_s = at_s
                yield Draft(
                    at_s=at_s,
                    prompt_tokens=max(1, prompt_tokens),
                    output_tokens=max(1, output_tokens),
                    write=partial(setting.text, f"azure/{rows.line_num}"),
                )
