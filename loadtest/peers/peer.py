"""What a peer is: how it is installed, started and known to be ready. The peers themselves are in `catalogue`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# A router's start; a peer that loads a model says how long it may take.
START_TIMEOUT_S = 120.0
# Free ports that a peer is given: the first is the one that it listens on.
PORTS = 32


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to run another engine like the one that is compared: the same weights, the same settings of vLLM."""

    weights: Path
    # Of vLLM, by its own names; the model and its served name apart.
    arguments: Mapping[str, Any]
    # Variables of the engine's process that decide its speed.
    env: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Engine:
    """The one engine that every way leads to."""

    host: str
    port: int
    model: str
    # It admits only who sends this header's value.
    token_header: str
    token: str = field(repr=False)
    # For a peer that hosts its engine itself; None where the engine is simulated: there is only the one.
    recipe: Recipe | None = None

    @property
    def url(self) -> str:
        """Without a trailing slash."""
        return f"http://{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Hosting:
    """What differs in a way that does not lead to the one engine as the others do."""

    # Name of the processes below the peer's that are, with theirs, its engine: not part of what the way costs. None
    # where there are none.
    engine_process: str | None
    # What a reader of its figures must know, for its line in the table.
    caveat: str


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
    # A file that it leaves beside its configuration once it is up, where answering alone does not mean that.
    ready_file: str | None = None
    start_timeout_s: float = START_TIMEOUT_S
    # The key that its clients send, if it asks for one.
    key: str | None = field(default=None, repr=False)
    # Whether the client's own token for the engine is passed on; else the peer adds it itself.
    passes_token: bool = True
    # None: it relays to the one engine.
    hosting: Hosting | None = None


@dataclass(frozen=True, slots=True)
class Environment:
    """What is installed for a peer, in a place of its own; peers that differ in configuration only share it."""

    name: str
    # Exact versions, as pip takes them, the main package first; their dependencies are resolved with them.
    requirements: tuple[str, ...]
    # Requirements that replace what a dependency asks for, in the form of pip's.
    overrides: tuple[str, ...] = ()

    @property
    def version(self) -> str:
        """Of its main package."""
        return self.requirements[0].partition("==")[2]

    def home(self, cache: Path) -> Path:
        """Where it lies: another version, another place."""
        return cache / f"{self.name}-{self.version}"


@dataclass(frozen=True, slots=True)
class Peer:
    """A way to an engine that is not ours."""

    name: str
    # What its hot path is written in.
    language: str
    environment: Environment
    # Where its configuration below is documented as the best for throughput.
    source: str
    # From the engine and the first of the peer's ports.
    launch: Callable[[Engine, int], Launch]

    @property
    def version(self) -> str:
        """Of its main package."""
        return self.environment.version
