"""Reads the signals of scaling decisions from Prometheus, in the background, and says how old they are.

It promises that asking never waits and never raises, and that trouble shows as age or as no value, never as a jump:
an answer that is late, cut, no JSON, an error or only a part ("warnings") changes nothing, and what was read before
grows older. The age of a signal is that of its samples by Prometheus' own clock (`serving.metrics.rules` records it)
plus the time since Prometheus was asked, by ours, so the two clocks are never compared.

Ray's `PrometheusQueryMixin` (ray.serve.autoscaling_policy) is not used: it keeps a value without its timestamp, so
that a stopped scrape looks as good as a fresh one for the five minutes that Prometheus repeats it; it sends one
HTTP request an expression, so that the values of one decision are of different moments; and what it knows of
itself is whether its cache is younger than a bound, while a decision needs the age. One request here answers for
every model, and nothing of Ray is imported.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import math
import socket
import threading
import time
import urllib.parse
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from serving.autoscaling.snapshot import NO_SIGNAL, Signal, Snapshot
from serving.metrics.release import matcher, scoped
from serving.metrics.rules import SAMPLED, SCRAPE_S, SIGNALS

DEFAULT_TIMEOUT_S: Final = 3.0
REFRESH_S: Final = float(SCRAPE_S)
# Twelve signals and two timestamps a model, about 150 bytes each: room for a thousand models.
MAX_ANSWER_BYTES: Final = 4 * 1024 * 1024
HTTP_OK: Final = 200

# The rules' own names. A name that a rule does not have yet is no error.
_RECORDS: Final = f'{{__name__=~"{"|".join([*(rule.record for rule in SIGNALS), SAMPLED])}"}}'


def query_of(release: str) -> str:
    """One query for everything of a release, and of no other that the same Prometheus watches; "": the unnamed one."""
    return scoped(_RECORDS, matcher(release))


QUERY: Final = query_of("")

# (url, timeout_s) -> body of the answer; raises OSError, http.client.HTTPException or ValueError.
Fetch = Callable[[str, float], bytes]
# body of an answer -> by model, the signals with their ages; raises ValueError.
Parse = Callable[[bytes], Mapping[str, Mapping[str, Signal]]]


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer of Prometheus: by model, the signals with their ages at the moment of asking."""

    asked_at_s: float
    models: Mapping[str, Mapping[str, Signal]]


@dataclass(frozen=True, slots=True)
class ReaderState:
    """How reading goes, for metrics and logs."""

    # Since the newest answer that could be used was asked for; inf: there was none.
    answer_age_s: float
    failures: int
    # Why the newest attempt failed; "" where it did not.
    problem: str


class SignalReader:
    """The signals of every model of one Prometheus; thread-safe.

    The first use starts the background thread, so an unused reader costs nothing and can be pickled; it ends with
    `stop`, or when the reader is garbage. `clock` is monotonic, in seconds.
    """

    def __init__(
        self,
        url: str,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        clock: Callable[[], float] = time.monotonic,
        *,
        fetch: Fetch | None = None,
        refresh_s: float = REFRESH_S,
        query: str = QUERY,
        parser: Parse | None = None,
    ) -> None:
        """`query` and `parser` are for another question than that for every model's signals."""
        self._arguments = (url, timeout_s, clock, fetch, refresh_s, query, parser)
        self._clock = clock
        self._lock = threading.Lock()
        self._memory: _Memory | None = None

    def __getstate__(self) -> tuple[Any, ...]:
        return self._arguments

    def __setstate__(self, arguments: tuple[Any, ...]) -> None:
        url, timeout_s, clock, fetch, refresh_s, query, parser = arguments
        SignalReader.__init__(self, url, timeout_s, clock, fetch=fetch, refresh_s=refresh_s, query=query, parser=parser)

    def signals(self, model: str) -> dict[str, Signal]:
        """By field of Snapshot, with ages as of now; `NO_SIGNAL` for what is not known."""
        found = self.answered(model)
        return {rule.field: found.get(rule.field, NO_SIGNAL) for rule in SIGNALS}

    def answered(self, model: str) -> dict[str, Signal]:
        """What the newest answer has of a model, with ages as of now."""
        answer = self._started().answer
        if answer is None:
            return {}
        passed_s = self._clock() - answer.asked_at_s
        return {name: _older(signal, passed_s) for name, signal in answer.models.get(model, {}).items()}

    def fill(self, snapshot: Snapshot, model: str) -> Snapshot:
        """The snapshot with the model's signals."""
        changes: dict[str, Any] = dict(self.signals(model))
        return replace(snapshot, **changes)

    def state(self) -> ReaderState:
        """How reading goes."""
        memory = self._started()
        answer = memory.answer
        age_s = math.inf if answer is None else self._clock() - answer.asked_at_s
        return ReaderState(age_s, memory.failures, memory.problem)

    def refresh(self) -> None:
        """Ask Prometheus once, here and now (the background thread does the same); never raises."""
        _refresh(self._memory_of(), self._asking())

    def stop(self) -> None:
        """End the background thread after the request under way."""
        self._memory_of().stopped.set()

    def _asking(self) -> _Asking:
        url, timeout_s, clock, fetch, _, query, parser = self._arguments
        return _Asking(url, timeout_s, clock, fetch or fetch_http, query, parser or parse)

    def _memory_of(self) -> _Memory:
        with self._lock:
            if self._memory is None:
                self._memory = _Memory()
            return self._memory

    def _started(self) -> _Memory:
        memory = self._memory_of()
        with self._lock:
            if not memory.started:
                memory.started = True
                refresh_s = self._arguments[4]
                threading.Thread(
                    target=_keep_fresh,
                    args=(memory, self._asking(), refresh_s),
                    name="galerne-signals",
                    daemon=True,
                ).start()
                weakref.finalize(self, memory.stopped.set)
        return memory


@dataclass(slots=True)
class _Memory:
    """What thread and reader share; each field is replaced whole, so a reader sees one answer or the next."""

    answer: Answer | None = None
    failures: int = 0
    problem: str = "not asked yet"
    started: bool = False
    stopped: threading.Event = field(default_factory=threading.Event)


@dataclass(frozen=True, slots=True)
class _Asking:
    """Whom to ask, what, and how the answer is read."""

    url: str
    timeout_s: float
    clock: Callable[[], float]
    fetch: Fetch
    query: str
    parser: Parse


def _keep_fresh(memory: _Memory, asking: _Asking, refresh_s: float) -> None:
    while not memory.stopped.is_set():
        started_s = asking.clock()
        _refresh(memory, asking)
        memory.stopped.wait(max(0.0, refresh_s - (asking.clock() - started_s)))


def _refresh(memory: _Memory, asking: _Asking) -> None:
    asked_at_s = asking.clock()
    # A plain number is seconds; with a unit Prometheus takes no fractions.
    query = urllib.parse.urlencode({"query": asking.query, "timeout": f"{asking.timeout_s:g}"})
    try:
        body = asking.fetch(f"{asking.url.rstrip('/')}/api/v1/query?{query}", asking.timeout_s)
        memory.answer = Answer(asked_at_s, asking.parser(body))
    except Exception as error:  # The thread outlives whatever an answer holds.
        memory.failures += 1
        memory.problem = f"{type(error).__name__}: {error}"[:200]
    else:
        memory.problem = ""


def parse(body: bytes) -> dict[str, dict[str, Signal]]:
    """Signals by model and field, with their ages at evaluation; ValueError where the answer cannot be believed.

    A value that is no finite number of at least 0, stands twice or has no sample age is no signal; nothing else of
    the answer suffers from it.
    """
    values: dict[tuple[str, str], list[float]] = {}
    ages: dict[tuple[str, str], list[float]] = {}
    for row in rows(body):
        if (sample := _sample(row)) is None:
            continue
        name, labels, at_s, value = sample
        if name == SAMPLED:
            ages.setdefault((labels["model"], str(labels.get("source"))), []).append(at_s - value)
        else:
            values.setdefault((labels["model"], name), []).append(value)
    return {
        model: {
            rule.field: Signal(only, max(by_source))
            for rule in SIGNALS
            if (only := only_one(values.get((model, rule.record), ()))) is not None
            and (by_source := _all([only_one(ages.get((model, source), ())) for source in rule.sources]))
        }
        for model in {model for model, _ in values}
    }


def rows(body: bytes) -> list[Any]:
    """The elements of an instant vector; ValueError where the answer is none, or tells that it is incomplete."""
    document = json.loads(body)
    if not isinstance(document, dict) or document.get("status") != "success":
        raise ValueError("Prometheus does not report success")
    if document.get("warnings"):
        # A part of a federation did not answer: sums over the rest would be too small.
        raise ValueError("Prometheus warns that its answer is incomplete")
    data = document.get("data")
    if not isinstance(data, dict) or data.get("resultType") != "vector" or not isinstance(data.get("result"), list):
        raise ValueError("Prometheus answers with something else than a vector")
    return list(data["result"])


def _sample(row: Any) -> tuple[str, dict[str, str], float, float] | None:
    """Name, labels, time of evaluation and value; None for a row that is not one of ours."""
    try:
        labels = row["metric"]
        at_s, value = map(float, row["value"])
        name, model = labels["__name__"], labels["model"]
    except (KeyError, TypeError, ValueError):
        return None
    if not (isinstance(name, str) and isinstance(model, str)) or not math.isfinite(at_s) or not math.isfinite(value):
        return None
    return name, labels, at_s, value


def only_one(found: Iterable[float]) -> float | None:
    """The one value that is there, at least 0; of two nobody knows which is meant."""
    values = tuple(found)
    return values[0] if len(values) == 1 and values[0] >= 0 else None


def _all(found: list[float | None]) -> list[float]:
    """Every value, or none where one is missing."""
    return [] if None in found else [value for value in found if value is not None]


def _older(signal: Signal, passed_s: float) -> Signal:
    return signal if signal.value is None else Signal(signal.value, signal.age_s + passed_s)


def fetch_http(url: str, timeout_s: float) -> bytes:
    """GET within `timeout_s` in all; raises OSError, http.client.HTTPException or ValueError.

    A socket's own timeout is for each read, and an answer that drips would take for ever: the connection is cut.
    """
    parts = urllib.parse.urlsplit(url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.hostname or "", parts.port, timeout=timeout_s)
    try:
        connection.connect()
        ends = threading.Timer(timeout_s, _cut, (connection.sock,))
        ends.daemon = True
        ends.start()
        try:
            return _get(connection, f"{parts.path}?{parts.query}")
        finally:
            ends.cancel()
    finally:
        connection.close()


def _cut(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


def _get(connection: http.client.HTTPConnection, target: str) -> bytes:
    connection.request("GET", target, headers={"Accept": "application/json"})
    with connection.getresponse() as answer:
        if answer.status != HTTP_OK:
            raise ValueError(f"HTTP status {answer.status}")
        body = answer.read(MAX_ANSWER_BYTES + 1)
    if len(body) > MAX_ANSWER_BYTES:
        raise ValueError(f"the answer exceeds {MAX_ANSWER_BYTES} bytes")
    return body
