"""A scenario: who sends what how fast for how long, and what counts as well served; made into requests by `plan`.

Everything follows from the file and its seed: the same scenario plans the same requests on every machine.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import Field, PrivateAttr, SecretStr, ValidationError, model_validator

from loadtest import lined_yaml
from loadtest.errors import LoadtestError
from loadtest.pacing import Arrivals, Profile, Trace
from loadtest.planner import Plan, StreamPlan
from loadtest.strict import Strict
from loadtest.workloads import AnyWorkload, Setting, data_folder
from loadtest.workloads.text import DEFAULT_TOKENS_PER_WORD

BUNDLED = Path(__file__).parent / "scenarios"
DEFAULT_MAX_ERROR_SHARE = 0.01

_Name = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[A-Za-z0-9._-]+$")]
_Seconds = Annotated[float, Field(gt=0)]


class Slo(Strict):
    """What a run must hold; None is not judged. Percentiles are over all measured requests, in seconds."""

    ttft_p95_s: _Seconds | None = None
    itl_p95_s: _Seconds | None = None
    e2e_p95_s: _Seconds | None = None
    # Share of planned requests that did not complete.
    max_error_share: Annotated[float, Field(ge=0, le=1)] = DEFAULT_MAX_ERROR_SHARE


class Stream(Strict):
    """One tenant's requests of one kind."""

    tenant: _Name
    # An API key, or $NAME of the environment variable that holds it; none for a target that asks for none.
    key: Annotated[SecretStr, Field(min_length=1)] | None = None
    model: Annotated[str, Field(min_length=1)]
    workload: AnyWorkload
    arrivals: Arrivals
    # Tells two streams of one tenant apart, in notes and in their draws.
    name: _Name | None = None

    @property
    def label(self) -> str:
        """Its name in notes; the tenant where it has none."""
        return self.name or self.tenant

    @model_validator(mode="after")
    def _has_times(self) -> Stream:
        if isinstance(self.arrivals, Trace) and not self.workload.timed:
            raise ValueError(
                f"workload {self.workload.kind} has no times of its own for arrivals of kind trace; "
                "allowed: poisson, gamma, constant, profile"
            )
        return self


class Scenario(Strict):
    """A load run; the warm-up comes before `duration_s` and is planned like the rest."""

    name: _Name
    duration_s: Annotated[float, Field(gt=0, le=7 * 86_400)]
    warm_up_s: Annotated[float, Field(ge=0, le=86_400)] = 0.0
    seed: int = 0
    # Of the model's tokenizer, for filler; see workloads/text.py.
    tokens_per_word: Annotated[float, Field(gt=0, le=100)] = DEFAULT_TOKENS_PER_WORD
    slo: Slo = Slo()
    streams: Annotated[tuple[Stream, ...], Field(strict=False, min_length=1)]
    # Keys of tenants that only a workload's own lines name.
    keys: dict[_Name, SecretStr] = Field(default_factory=dict)

    # The folder that paths in the scenario are relative to.
    _base: Path = PrivateAttr(default=Path())

    @property
    def total_s(self) -> float:
        """Seconds for which requests are sent, the warm-up included."""
        return self.warm_up_s + self.duration_s

    @model_validator(mode="after")
    def _consistent(self) -> Scenario:
        labels = Counter(stream.label for stream in self.streams)
        if twice := [label for label, count in labels.items() if count > 1]:
            raise ValueError(f"streams {', '.join(twice)} appear twice; give each a 'name' of its own")
        for stream in self.streams:
            steps = stream.arrivals
            if isinstance(steps, Profile) and steps.length_s < self.total_s:
                raise ValueError(
                    f"the steps of stream {stream.label} end at {steps.length_s:g} s, the run at {self.total_s:g} s "
                    "(warm_up_s + duration_s); add a step, of rate 0 for silence"
                )
            if self._key_of(stream.tenant) != stream.key:
                raise ValueError(f"tenant {stream.tenant} has two different keys; give it the same in all its streams")
        return self

    def _key_of(self, tenant: str) -> SecretStr | None:
        return next((stream.key for stream in self.streams if stream.tenant == tenant), self.keys.get(tenant))

    @property
    def tenants(self) -> frozenset[str]:
        """All tenants that requests may name."""
        return frozenset(self.keys) | {stream.tenant for stream in self.streams}

    def key_of(self, tenant: str, environ: Mapping[str, str] = os.environ) -> str | None:
        """The API key of a planned request's tenant (TENANT/CLIENT uses TENANT's), None where it has none.

        Raises LoadtestError when the environment lacks the variable that the scenario names.
        """
        key = self._key_of(tenant.partition("/")[0])
        value = None if key is None else key.get_secret_value()
        if value is None or not value.startswith("$"):
            return value
        if not environ.get(value[1:]):
            raise LoadtestError(f"the key of tenant {tenant} is to come from {value}, which is not set; export it")
        return environ[value[1:]]


def plan(scenario: Scenario, *, salt: str = "", data: Path | None = None, base: Path | None = None) -> Plan:
    """The scenario's requests, merged by time, made while they are iterated.

    `salt` changes the words of filler, not times or lengths: give each run its own, and no run is answered from
    the prefix cache of the one before. `data` is the folder of the public traces, `base` the one that paths
    in the scenario are relative to (default: its file's). Iterating raises LoadtestError for a source that
    is missing or malformed.
    """
    streams = []
    for stream in scenario.streams:
        trace = stream.arrivals if isinstance(stream.arrivals, Trace) else None
        setting = Setting(
            seed=f"{scenario.seed}/{stream.label}",
            salt=salt,
            tokens_per_word=scenario.tokens_per_word,
            data=data or data_folder(),
            base=scenario._base if base is None else base,
            tenants=scenario.tenants,
            needs_times=trace is not None,
            from_s=trace.from_s if trace else 0.0,
            until_s=trace.from_s + scenario.total_s * trace.speed if trace else float("inf"),
        )
        streams.append(StreamPlan(stream.label, stream.tenant, stream.model, stream.workload, stream.arrivals, setting))
    return Plan(streams, until_s=scenario.total_s)


def bundled() -> dict[str, Path]:
    """The scenarios that come with the load tester, by name."""
    return {path.stem: path for path in sorted(BUNDLED.glob("*.yaml"))}


def load(name: str | Path) -> Scenario:
    """The scenario in a YAML file, or a bundled one by its name.

    Raises LoadtestError with file, line, field and what is allowed, one problem a line.
    """
    path = bundled().get(str(name), Path(name))
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise LoadtestError(f"{path}: not UTF-8 text; save it as UTF-8") from None
    except OSError as error:
        names = ", ".join(bundled())
        raise LoadtestError(
            f"{path}: cannot be read: {error.strerror}; give a file or one of the bundled scenarios: {names}"
        ) from error
    return parse(text, str(path), base=path.parent)


def parse(text: str, name: str, *, base: Path = Path()) -> Scenario:
    """The scenario in a YAML text; `name` stands before each problem, `base` is as for `plan`. Raises LoadtestError."""
    lined = lined_yaml.read(text, name)
    try:
        scenario = Scenario.model_validate(lined.value)
    except ValidationError as error:
        details = error.errors(include_url=False, include_input=False)
        raise LoadtestError("\n".join(lined.sentence(detail) for detail in details)) from None
    scenario._base = base
    return scenario
