"""Which part of the configuration may change while it is served, and what the rest was.

Tenants and administrators change live. All else shapes processes (engines, ports, limits of the edge), and a change of
it waits for a restart or a rollout; it is named, never half applied.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Final

from serving.config.root import GalerneConfig

# What may stand in `tenants_file`, too.
LIVE: Final = ("tenants", "admins")
# Where the live part stands is no setting of its own.
_NOT_COMPARED: Final = frozenset({*LIVE, "tenants_file"})


@dataclass(frozen=True, slots=True)
class Source:
    """The file a running configuration was read from, and digests of its sections that stay as they were read."""

    path: str
    sections: Mapping[str, str]

    @classmethod
    def of(cls, path: Path, config: GalerneConfig) -> Source:
        """`config` as the file has it: before a command line or a test changes anything."""
        return cls(str(path.absolute()), sections(config))

    def waiting(self, config: GalerneConfig) -> tuple[str, ...]:
        """Sections of a newer state of the file that differ, and wait for a restart."""
        now = sections(config)
        return tuple(sorted(name for name in now if now[name] != self.sections.get(name)))


def sections(config: GalerneConfig) -> dict[str, str]:
    """A digest of each section that does not change live."""
    return {
        name: sha256(config.model_dump_json(include={name}, by_alias=True).encode()).hexdigest()
        for name in type(config).model_fields
        if name not in _NOT_COMPARED
    }


def with_live(running: GalerneConfig, newer: GalerneConfig) -> GalerneConfig:
    """The running configuration with the newer one's live part.

    Both were checked, each as a whole. A tenant may name a model that only the newer one has: until that is rolled out
    the model does not exist for it, as for everybody.
    """
    return running.model_copy(update={name: getattr(newer, name) for name in LIVE})
