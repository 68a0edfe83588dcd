"""Tenants and keys change while requests run: what is taken, what is refused, and that nobody notices who need not."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import yaml
from structlog.testing import capture_logs

from serving.api.auth import digest
from serving.api.reload import Reloader
from serving.config import FakeEngineConfig, GalerneConfig
from serving.config.live import Source, sections
from serving.config_file import load
from serving.errors import ConfigError
from serving.metrics.gateway import GatewayMetrics
from tests.unit.test_gateway import CHAT, COMPLETIONS, configuration, rig

MODELS = [{"id": "chat", "source": "fake:chat"}, {"id": "vectors", "source": "fake:v", "task": "embed"}]


def tenant(name: str, *keys: str, **fields: Any) -> dict[str, Any]:
    return {"id": name, "keys": [{"id": key, "sha256": digest(f"sk-{key}")} for key in keys]} | fields


def written(path: Path, *tenants: dict[str, Any], **fields: Any) -> Path:
    path.write_text(yaml.safe_dump({"models": MODELS, "tenants": list(tenants)} | fields))
    return path


class Taken:
    """A reloader over a file, and what it has applied."""

    def __init__(self, path: Path, pause: Callable[[float], None] = lambda _: None) -> None:
        self.configs: list[GalerneConfig] = []
        self.metrics = GatewayMetrics(time.monotonic)
        config = load(path)
        source = Source.of(path, config)
        self.reloader = Reloader(source, config, self.configs.append, self.metrics, wall=lambda: 7.0, pause=pause)
        self.reloader.start()

    def look(self) -> list[list[str]]:
        """Poll once; the tenants of each state applied so far."""
        found = self.reloader.look()
        if found is not None:
            self.reloader.take(found)
        return [[t.id for t in config.tenants] for config in self.configs]

    def value(self, name: str, **labels: str) -> float:
        return sum(value for found, value in self.metrics.counts(name) if labels.items() <= found.items())


def test_a_change_is_taken_once(tmp_path: Path) -> None:
    taken = Taken(written(tmp_path / "c.yaml", tenant("a", "k1")))
    assert taken.look() == [["a"]]
    written(tmp_path / "c.yaml", tenant("a", "k1"), tenant("b", "k2"))
    assert taken.look() == taken.look() == [["a"], ["a", "b"]]
    assert taken.value("galerne_config_reloads", outcome="applied") == 2
    assert [v for _, v in taken.metrics.counts("galerne_config_info")] == [1]
    assert taken.value("galerne_config_applied_timestamp_seconds") == 7


def test_a_broken_file_changes_nothing_and_says_where(tmp_path: Path) -> None:
    path = written(tmp_path / "c.yaml", tenant("a", "k1"))
    good = path.read_text()
    taken = Taken(path)
    path.write_text(good.replace("id: a", "id: A!"))
    with capture_logs() as lines:
        assert taken.look() == taken.look() == [["a"]]
    [line] = [line for line in lines if line["log_level"] == "error"]
    at = good[: good.index("id: a")].count("\n") + 1
    assert line["problems"][0].startswith(f"{path}:{at}: tenants[0].id: must be ")
    assert (taken.value("galerne_config_reload_ok"), taken.value("galerne_config_reloads", outcome="failed")) == (0, 1)
    # Put back: in force all along.
    path.write_text(good)
    assert taken.look() == [["a"]]
    assert taken.value("galerne_config_reload_ok") == 1


def test_a_file_that_vanishes_changes_nothing(tmp_path: Path) -> None:
    taken = Taken(path := written(tmp_path / "c.yaml", tenant("a", "k1")))
    path.unlink()
    assert taken.look() == [["a"]]
    assert taken.value("galerne_config_reload_ok") == 0


def test_a_file_that_is_being_written_is_waited_for(tmp_path: Path) -> None:
    path = written(tmp_path / "c.yaml", tenant("a", "k1"), tenant("b", "k2"))
    whole = path.read_text()
    # Half of it is a configuration too: with fewer tenants.
    half = yaml.safe_dump({"models": MODELS, "tenants": [tenant("a", "k1")]})
    taken = Taken(path, pause=lambda _: path.write_text(whole + "# more\n"))
    path.write_text(half)
    assert taken.look() == [["a", "b"]]
    assert taken.look() == [["a", "b"], ["a", "b"]]


def test_a_secret_is_swapped_by_symlink(tmp_path: Path) -> None:
    for state, names in (("..1", ("a",)), ("..2", ("a", "b"))):
        (tmp_path / state).mkdir()
        written(tmp_path / state / "galerne.yaml", *(tenant(name, f"k{name}") for name in names))
    (tmp_path / "..data").symlink_to("..1")
    (tmp_path / "galerne.yaml").symlink_to("..data/galerne.yaml")
    taken = Taken(tmp_path / "galerne.yaml")
    (tmp_path / "..tmp").symlink_to("..2")
    (tmp_path / "..tmp").rename(tmp_path / "..data")
    assert taken.look() == [["a"], ["a", "b"]]


def test_what_does_not_change_live_is_named_and_left(tmp_path: Path) -> None:
    taken = Taken(path := written(tmp_path / "c.yaml", tenant("a", "k1")))
    limits = {"limits": {"n": 3}, "models": [*MODELS, {"id": "new", "source": "fake:new"}]}
    with capture_logs() as lines:
        written(path, tenant("a", "k1"), tenant("b", "k2", models=["new"]), **limits)
        assert taken.look() == [["a"], ["a", "b"]]
    assert [line["sections"] for line in lines if "sections" in line] == [["limits", "models"]]
    assert taken.configs[-1].limits.n == 8
    assert [m.id for m in taken.configs[-1].models] == ["chat", "vectors"]
    assert taken.value("galerne_config_sections_waiting") == 2
    written(path, tenant("a", "k1"))
    taken.look()
    assert taken.value("galerne_config_sections_waiting") == 0


def test_a_process_that_starts_late_begins_with_the_file_as_it_is(tmp_path: Path) -> None:
    path = written(tmp_path / "c.yaml", tenant("a", "k1"))
    given = load(path)
    source = Source.of(path, given)
    written(path, tenant("b", "k2"))
    applied: list[GalerneConfig] = []
    Reloader(source, given, applied.append, GatewayMetrics(time.monotonic)).start()
    assert [t.id for t in applied[0].tenants] == ["b"]


async def test_what_goes_wrong_once_does_not_end_the_watch(tmp_path: Path) -> None:
    path = written(tmp_path / "c.yaml", tenant("a", "k1"))
    config, applied = load(path), []

    def apply(newer: GalerneConfig) -> None:
        applied.append(newer)
        if len(applied) == 2:
            raise RuntimeError("a defect")

    metrics = GatewayMetrics(time.monotonic)
    reloader = Reloader(Source.of(path, config), config, apply, metrics, pause=lambda _: None)
    reloader.start()
    states = iter(("b", "c"))

    async def sleep(_: float) -> None:
        name = next(states, None)
        if name is None:
            raise asyncio.CancelledError
        written(path, tenant(name, "k"))

    with pytest.raises(asyncio.CancelledError):
        await reloader.run(sleep)
    assert [config.tenants[0].id for config in applied] == ["a", "b", "c"]


# -- the file of tenants


def beside(tmp_path: Path, **found: Any) -> Path:
    (tmp_path / "tenants.yaml").write_text(yaml.safe_dump(found))
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"models": MODELS, "tenants_file": "tenants.yaml"}))
    return tmp_path / "c.yaml"


def test_tenants_may_stand_in_a_file_of_their_own(tmp_path: Path) -> None:
    admins = [{"id": "nadia", "sha256": digest("sk-admin")}]
    path = beside(tmp_path, tenants=[tenant("a", "k1")], admins=admins)
    taken = Taken(path)
    assert taken.configs[0].admins[0].id == "nadia"
    beside(tmp_path, tenants=[tenant("b", "k1")])
    assert taken.look() == [["a"], ["b"]]
    # Another file is named: the next look takes it.
    (tmp_path / "more.yaml").write_text(yaml.safe_dump({"tenants": [tenant("c", "k1")]}))
    path.write_text(path.read_text().replace("tenants.yaml", "more.yaml"))
    taken.look()
    assert taken.look() == [["a"], ["b"], ["c"]]
    assert taken.value("galerne_config_sections_waiting") == 0


@pytest.mark.parametrize(
    ("text", "file", "line", "problem"),
    [
        ("tenants:\n- id: a\n  keys: []\n", "tenants.yaml", 3, "tenants[0].keys: must not be empty"),
        ("tenants:\n- {id: a, kys: []}\n", "tenants.yaml", 2, "tenants[0].kys: unknown field"),
        ("tenants: []\nmodels: []\n", "tenants.yaml", 2, "models: unknown field; allowed: tenants, admins"),
        ("tenants: [\n", "tenants.yaml", 2, "not valid YAML"),
        ("- a\n", "tenants.yaml", 1, "a file of tenants is a mapping"),
        (None, "c.yaml", 7, "tenants_file: "),
    ],
)
def test_its_mistakes_are_told_with_its_own_lines(
    tmp_path: Path, text: str | None, file: str, line: int, problem: str
) -> None:
    path = beside(tmp_path)
    (tmp_path / "tenants.yaml").unlink()
    if text is not None:
        (tmp_path / "tenants.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(path)
    first = caught.value.problems[0]
    assert first.startswith(f"{tmp_path / file}:{line}:")
    assert problem in first


def test_a_part_stands_in_one_file(tmp_path: Path) -> None:
    path = beside(tmp_path, tenants=[tenant("a", "k1")])
    path.write_text(path.read_text() + yaml.safe_dump({"tenants": [tenant("b", "k2")]}))
    with pytest.raises(ConfigError, match="keep one"):
        load(path)


def test_sections_are_those_that_stay() -> None:
    assert {"tenants", "admins", "tenants_file"}.isdisjoint(sections(configuration()))
    assert set(sections(configuration())) | {"tenants", "admins", "tenants_file"} == set(GalerneConfig.model_fields)


# -- under load

CHANGES = 20
STAYS, LEAVES, COMES = "sk-stays", "sk-leaves", "sk-comes"


def state(number: int) -> dict[str, Any]:
    """The file's tenants at a change: one key stays, one is taken away in turns (in each of four ways), one comes."""
    stays = {"id": "stays", "sha256": digest(STAYS)}
    leaves: dict[str, Any] = {"id": "leaves", "sha256": digest(LEAVES)}
    ways: list[dict[str, Any]] = [
        {},
        {"revoked": True},
        {},
        {"expires": "2020-01-01"},
        {},
        {"networks": ["10.0.0.0/8"]},
    ]
    tenants = [
        {"id": "press", "keys": [stays], "models": ["chat"]},
        {"id": "other", "keys": [leaves | ways[number % 6]]},
    ]
    if number % 8 == 7:
        tenants.pop()
    if number % 3:
        tenants.append({"id": f"comes-{number}", "keys": [{"id": "comes", "sha256": digest(COMES)}]})
    return {"tenants": tenants}


def admitted(number: int) -> set[str]:
    good = {STAYS}
    if number % 2 == 0:
        good.add(LEAVES)
    if number % 3:
        good.add(COMES)
    return good


async def test_twenty_changes_under_load_admit_nobody_wrongly_and_drop_nobody(tmp_path: Path) -> None:
    running = configuration()
    path = tmp_path / "c.yaml"
    document = running.model_dump(mode="json", by_alias=True)
    path.write_text(yaml.safe_dump(document | state(0)))
    source = Source.of(path, load(path))
    wrong: list[str] = []
    answered = {STAYS: 0, LEAVES: 0, COMES: 0}
    force, done, rng = 0, False, Random(3)

    async with rig(FakeEngineConfig(decode_ms=1)) as made:
        applied = asyncio.Event()

        def apply(newer: GalerneConfig) -> None:
            made.gateway.reload(newer)
            applied.set()

        reloader = Reloader(source, running, apply, made.metrics, pause=lambda _: None)
        reloader.start()
        watch = asyncio.create_task(reloader.run(lambda _: asyncio.sleep(0.002)))

        async def client(key: str) -> None:
            while not done:
                before = force
                body = CHAT | {"stream": rng.random() < 0.5, "max_tokens": rng.choice((2, 30))}
                answer = await made.http.post(COMPLETIONS, headers={"authorization": f"Bearer {key}"}, json=body)
                # Either state is right for a request sent while the file changed.
                right = {key in admitted(number) for number in range(before, force + 2)}
                whole = answer.status_code != 200 or not body["stream"] or answer.text.endswith("data: [DONE]\n\n")
                if answer.status_code not in {200, 401} or (answer.status_code == 200) not in right or not whole:
                    wrong.append(f"{key} at {before}..{force}: {answer.status_code} {answer.text[-80:]}")
                answered[key] += answer.status_code == 200

        clients = [asyncio.create_task(client(key)) for key in (STAYS, LEAVES, COMES) for _ in range(3)]
        for number in range(1, CHANGES + 1):
            await asyncio.sleep(0.03)
            text = yaml.safe_dump(document | state(number))
            if number % 5 == 0:
                path.write_text(text.replace("press", "PRESS"))  # cannot be used: nothing changes
                await asyncio.sleep(0.03)
            applied.clear()
            if number % 2:
                path.write_text(text)
            else:
                (tmp_path / "next").write_text(text)
                (tmp_path / "next").rename(path)
            await asyncio.wait_for(applied.wait(), 20)
            force = number
        done = True
        await asyncio.gather(*clients)
        watch.cancel()
        assert not wrong
        assert min(answered.values()) > 0
        assert made.total("galerne_requests_finished_total", outcome="failed") == 0
        assert made.total("galerne_config_reloads_total", outcome="applied") == CHANGES + 1
        reasons = ("revoked", "expired", "network", "unknown")
        assert all(made.total("galerne_requests_denied_total", reason=reason) > 0 for reason in reasons)


async def test_a_running_stream_outlives_its_tenant() -> None:
    running = configuration()
    async with rig(FakeEngineConfig(decode_ms=5)) as made:
        headers = {"authorization": "Bearer sk-press"}
        body = CHAT | {"stream": True, "max_tokens": 40}
        async with made.http.stream("POST", COMPLETIONS, headers=headers, json=body) as stream:
            lines = stream.aiter_lines()
            await anext(lines)
            others = tuple(t for t in running.tenants if t.id != "press")
            made.gateway.reload(running.model_copy(update={"tenants": others}))
            refused = await made.http.post(COMPLETIONS, headers=headers, json=CHAT)
            assert refused.status_code == 401
            assert [line async for line in lines if line][-1] == "data: [DONE]"
        assert made.total("galerne_requests_finished_total", tenant="press", outcome="completed") == 1
