"""Where the ledger of usage is kept."""

from __future__ import annotations

import re
from typing import Annotated, Final

from pydantic import Field, field_validator

from serving.config.base import Frozen, PositiveInt

# Names the database in place of `url`, so that a password need not stand in the file (a Secret, on Kubernetes).
ENV_LEDGER_URL: Final = "GALERNE_LEDGER_URL"
# What paths of this section that do not begin with '/' are below; else ~/ledger.
ENV_LEDGER_DIR: Final = "GALERNE_LEDGER_DIR"


class LedgerConfig(Frozen):
    """One row for every accepted request: who, which model, how many tokens."""

    # sqlite:///file.db (one machine), or postgresql://user:password@host:port/database, which all gateways of a cluster
    # share. The variable GALERNE_LEDGER_URL goes before it.
    # It may hold a password: no text of this object shows it.
    url: Annotated[str, Field(repr=False)] = "sqlite:///galerne.db"
    # A request that ended longer ago is on the gateway's disk: this much is lost with a gateway that is killed.
    flush_s: Annotated[float, Field(ge=0.05, le=60, strict=True)] = 1.0
    # Where rows wait until they are in the database; on a disk of its machine. It outlives the gateway's process.
    spill_dir: Annotated[str, Field(min_length=1)] = "ledger-spill"
    # What waits there at most, bytes. Beyond it new rows are lost, counted, logged and alerted on: requests are served.
    spill_bytes: PositiveInt = 256 * 1024 * 1024

    @field_validator("url")
    @classmethod
    def _known_scheme(cls, value: str) -> str:
        if not known_ledger_url(value):
            raise ValueError("must be sqlite:///FILE or postgresql://USER:PASSWORD@HOST:PORT/DATABASE")
        return value


def known_ledger_url(url: str) -> bool:
    """Whether a URL names a database of a kind that is known."""
    return re.fullmatch(r"sqlite:///[^?#\s]+|postgresql://[^/\s]+/[^\s]+", url) is not None
