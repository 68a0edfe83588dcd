"""The ledger's settings on this machine: the configuration's, with the environment's word where it has one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from serving.config import ENV_LEDGER_DIR, ENV_LEDGER_URL, LedgerConfig, known_ledger_url
from serving.errors import ClusterError

SQLITE = "sqlite:///"
HOME_DIR = "ledger"


@dataclass(frozen=True, slots=True)
class LedgerSettings:
    """Where rows wait, and the database they go to, which no text shows."""

    url: str = field(repr=False)
    spill_dir: Path
    flush_s: float
    spill_bytes: int

    @property
    def is_shared(self) -> bool:
        """Whether several machines can write to the database."""
        return not self.url.startswith(SQLITE)


def settings(config: LedgerConfig, environment: Mapping[str, str]) -> LedgerSettings:
    """Raises ClusterError where the environment names a database of a kind that is not known."""
    url = environment.get(ENV_LEDGER_URL) or config.url
    if not known_ledger_url(url):
        raise ClusterError(f"{ENV_LEDGER_URL} must be sqlite:///FILE or postgresql://USER:PASSWORD@HOST:PORT/DATABASE")
    directory = Path(environment.get(ENV_LEDGER_DIR) or Path(environment.get("HOME", "/")) / HOME_DIR)
    if url.startswith(SQLITE):
        url = f"{SQLITE}{directory / url.removeprefix(SQLITE)}"
    return LedgerSettings(url, directory / config.spill_dir, config.flush_s, config.spill_bytes)
