"""What a peer is: how it is installed, started and known to be ready. The peers themselves are in `catalogue`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Engine:
    """The one engine that every way leads to."""

    host: str
    port: int
    model: str
    # It admits only who sends this header's value.
    token_header: str
    token: str = field(repr=False)

    @property
    def url(self) -> str:
        """Without a trailing slash."""
        return f"http://{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Launch:
    """One start of a peer: everything that the report prints, secrets apart."""

    # The program is a name in the peer's own environment.
    argv: tuple[str, ...]
    # Configuration files by name; they lie in the folder that it is started in.
    files: Mapping[str, str] = field(default_factory=dict, repr=False)
    env: Mapping[str, str] = field(default_factory=dict)
    # Answers 200 once requests are served.
    ready_path: str = "/health"
    # The key that its clients send, if it asks for one.
    key: str | None = field(default=None, repr=False)
    # Whether the client's own token for the engine is passed on; else the peer adds it itself.
    passes_token: bool = True


@dataclass(frozen=True, slots=True)
class Peer:
    """A way to an engine that is not ours."""

    name: str
    # What its hot path is written in.
    language: str
    # Exact versions, as pip takes them; its dependencies are resolved into its own environment.
    requirements: tuple[str, ...]
    # Where its configuration below is documented as the best for throughput.
    source: str
    # From the engine and the port to listen on.
    launch: Callable[[Engine, int], Launch]

    @property
    def version(self) -> str:
        """Of its main package."""
        return self.requirements[0].partition("==")[2]

    def home(self, cache: Path) -> Path:
        """Where its environment lies: another version, another environment."""
        return cache / f"{self.name}-{self.version}"
