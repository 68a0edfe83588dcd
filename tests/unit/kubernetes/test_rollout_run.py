"""Whole rollouts over HTTP: our commands on one side, KubeRay's rules on the other, a clock that tests move."""

from __future__ import annotations

import copy
import gzip
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from serving.cluster.kubernetes.client import Client
from serving.cluster.kubernetes.prometheus import Prometheus
from serving.cluster.kubernetes.rollout import ANNOTATION, Plan, Verdict
from serving.cluster.kubernetes.rollout_run import Rollout, Target, state_of, strategy_of
from serving.cluster.kubernetes.versions import config_changes, image_changes
from serving.errors import ApiUnreachable, ClusterError
from tests.unit.kubernetes import kuberay
from tests.unit.kubernetes.kuberay import NAME, NAMESPACE, KubeRay
from tests.unit.kubernetes.server import ApiServer, Document, Fault, Seen
from tests.unit.kubernetes.shared import shared_file

PLAN = Plan(share=25, observe_s=300, min_requests=100, start_s=900, give_up_s=600)


class World:
    """An API server with a release, KubeRay, Prometheus, and the time."""

    def __init__(self, server: ApiServer, client: Client, strategy: str) -> None:
        self.server, self.client = server, client
        server.put("ray.io", "rayservices", kuberay.service(strategy))
        for index in range(1, 5):
            server.put("", "pods", kuberay.pod(f"gw-{index}", f"c-{index}", "gateway", f"10.0.{index}.1"))
        self.kuberay = KubeRay(server)
        self.now_s = 1_000_000.0
        self.original = self.service()
        # Share of requests that miss, by address of the gateway; requests a query finds.
        self.missed = {"10.0.1.1": 0.01, "10.0.2.1": 0.01, "10.0.3.1": 0.01}
        self.requests = 1000.0
        self.queries: list[str] = []
        self.prometheus_up = True
        self.told: list[tuple[float, str, str]] = []
        self.on_wait: Callable[[], None] = lambda: None

    def service(self) -> Document:
        return self.server.find("ray.io", "rayservices", NAMESPACE, NAME)

    def fetch(self, query: str) -> bytes:
        if not self.prometheus_up:
            raise OSError("connection refused")
        self.queries.append(query)
        address = re.search(r'instance=~"\(([^)]*)\)', query)[1].replace("\\\\.", ".")
        pending = self.service()["status"]["pendingServiceStatus"]
        cluster = f"c-{address.split('.')[2]}"
        idle = cluster == pending.get("rayClusterName") and not pending.get("trafficRoutedPercent")
        value = 0 if idle else self.requests * (self.missed[address] if "met=" in query or "status=" in query else 1.0)
        return b'{"status":"success","data":{"resultType":"vector","result":[{"metric":{},"value":[1,"%f"]}]}}' % value

    def wait(self) -> None:
        for _ in range(3):
            self.now_s += 5
            self.kuberay.step(self.now_s)
        self.on_wait()

    def rollout(self, tell: Callable[[str, Verdict], None] | None = None) -> Rollout:
        def note(_: str, verdict: Verdict) -> None:
            self.told.append((self.now_s, verdict.action, verdict.reason))

        return Rollout(
            self.client,
            Prometheus(self.fetch),
            Target(NAMESPACE, NAME),
            clock=lambda: self.now_s,
            wait=self.wait,
            tell=tell or note,
        )

    def begin(self, plan: Plan = PLAN) -> Rollout:
        rollout = self.rollout()
        service = rollout.service()
        changes = image_changes(service, "registry/galerne:2") + config_changes(service, "galerne-config-new", "after")
        rollout.start(replace(plan, incremental=strategy_of(service)), changes, "after")
        return rollout


@pytest.fixture
def world(server: ApiServer, client: Client) -> World:
    return World(server, client, "NewClusterWithIncrementalUpgrade")


@pytest.fixture
def blue_green(server: ApiServer, client: Client) -> World:
    return World(server, client, "NewCluster")


@pytest.fixture(autouse=True)
def valid_all_along(request: pytest.FixtureRequest, server: ApiServer) -> Iterator[None]:
    """What we write is a RayService to KubeRay's own definition, with nothing beside it."""
    written: list[Any] = []
    server.on_write = lambda seen: written.append(copy.deepcopy(seen.body)) if seen.resource == "rayservices" else None
    yield
    path = shared_file("crds/ray.io_rayservices.yaml.gz")
    if path is None or not written:
        return
    schema = definition(path)
    for body in written:
        jsonschema.validate({"spec": {"upgradeStrategy": body["spec"]["upgradeStrategy"]}}, schema)


@lru_cache
def definition(path: Path) -> Document:
    """Of spec.upgradeStrategy, closed: a misspelt field is refused."""
    found = yaml.load(gzip.decompress(path.read_bytes()), yaml.CSafeLoader)  # it is the safe one
    schema = next(v for v in found["spec"]["versions"] if v["name"] == "v1")["schema"]["openAPIV3Schema"]
    spec = schema["properties"]["spec"]["properties"]["upgradeStrategy"]
    options = {**spec["properties"]["clusterUpgradeOptions"], "additionalProperties": False}
    strategy = {
        **spec,
        "additionalProperties": False,
        "properties": {**spec["properties"], "clusterUpgradeOptions": options},
    }
    return {"type": "object", "properties": {"spec": {"type": "object", "properties": {"upgradeStrategy": strategy}}}}


def test_a_good_version_gets_every_share_and_then_all(world: World) -> None:
    verdict = world.begin().run()
    assert verdict.action == "done"
    service = world.service()
    assert service["status"]["activeServiceStatus"]["rayClusterName"] == "c-2"
    assert world.kuberay.deleted == ["c-1"]
    # As it was, but for the version.
    assert service["spec"]["upgradeStrategy"] == world.original["spec"]["upgradeStrategy"]
    assert ANNOTATION not in service["metadata"]["annotations"]
    config = service["spec"]["rayClusterConfig"]
    for group in (config["headGroupSpec"], *config["workerGroupSpecs"]):
        assert group["template"]["spec"]["containers"][0]["image"] == "registry/galerne:2"
        assert group["template"]["spec"]["volumes"][0]["secret"]["secretName"] == "galerne-config-new"
    assert yaml.safe_load(service["spec"]["serveConfigV2"])["applications"][0]["args"]["revision"] == "after"
    held = [share for _, action, reason in world.told if action == "hold" for share in re.findall(r"^(\d+)%", reason)]
    assert held == ["25", "50", "75"]


def test_each_share_is_held_for_its_time(world: World) -> None:
    world.begin().run()
    times = {int(re.match(r"(\d+)%", r)[1]): at for at, action, r in world.told if action == "hold"}
    shifts = [at for at, action, _ in world.told if action == "shift"]
    for share, after in zip((25, 50, 75), shifts[1:], strict=True):
        assert after - times[share] >= PLAN.observe_s
    # While a share is held nothing moves.
    shares = [share for share, _, _ in world.kuberay.shares]
    assert sorted(set(shares)) == [0, 25, 50, 75, 100]
    assert shares == sorted(shares)


def test_neither_version_ever_has_less_capacity_than_traffic(world: World) -> None:
    world.begin().run()
    for traffic, new, old in world.kuberay.shares:
        assert new >= traffic
        assert old >= 100 - traffic
        assert new + old <= 100 + PLAN.share


def test_a_bad_version_is_taken_back_at_the_first_share(world: World) -> None:
    world.missed["10.0.2.1"] = 0.3
    verdict = world.begin().run()
    assert verdict.action == "rolled-back"
    assert "ttft: 30.0% of 1000 missed" in verdict.reason
    service = world.service()
    assert service["spec"] == world.original["spec"], "exactly as it was: KubeRay keeps the old cluster"
    assert service["status"]["activeServiceStatus"]["rayClusterName"] == "c-1"
    assert world.kuberay.deleted == ["c-2"]
    assert max(share for share, _, _ in world.kuberay.shares) == 25
    for traffic, new, old in world.kuberay.shares:
        assert new >= traffic
        assert old >= 100 - traffic


def test_a_version_that_turns_bad_later_is_taken_back(world: World) -> None:
    def turn() -> None:
        if world.kuberay.shares and world.kuberay.shares[-1][0] >= 50:
            world.missed["10.0.2.1"] = 0.5

    world.on_wait = turn
    assert world.begin().run().action == "rolled-back"
    assert world.service()["spec"] == world.original["spec"]
    assert world.service()["status"]["activeServiceStatus"]["rayClusterName"] == "c-1"


def test_a_version_no_worse_than_the_old_one_is_kept(world: World) -> None:
    world.missed = dict.fromkeys(world.missed, 0.2)
    assert world.begin().run().action == "done"


def test_a_version_that_fails_to_start_is_taken_back_without_traffic(world: World) -> None:
    world.kuberay.fails = True
    verdict = world.begin().run()
    assert verdict.action == "rolled-back"
    assert "no such weights" in verdict.reason
    assert {share for share, _, _ in world.kuberay.shares} == {0}


def test_a_version_that_never_comes_up_is_taken_back(world: World) -> None:
    world.kuberay.ready_after_s = 1e9
    verdict = world.begin().run()
    assert verdict.action == "rolled-back"
    assert "not ready after" in verdict.reason


@pytest.mark.parametrize("blind", ["no requests", "no prometheus"])
def test_without_a_verdict_it_is_held_and_then_taken_back(world: World, blind: str) -> None:
    world.requests = 3 if blind == "no requests" else world.requests
    world.prometheus_up = blind != "no prometheus"
    verdict = world.begin().run()
    assert verdict.action == "rolled-back"
    assert "no verdict after" in verdict.reason
    assert max(share for share, _, _ in world.kuberay.shares) == 25


def test_a_command_that_dies_leaves_the_share_held_and_another_goes_on(world: World) -> None:
    class Died(Exception): ...

    def die(_: str, verdict: Verdict) -> None:
        if verdict.action == "hold":
            raise Died

    rollout = world.begin()
    with pytest.raises(Died):
        world.rollout(die).run()
    for _ in range(1000):  # hours without anybody
        world.wait()
    assert world.kuberay.shares[-1][0] == 25, "held, not moved on"
    rollout.resume()
    assert rollout.run().action == "done"


def test_a_command_that_is_interrupted_on_the_way_holds(world: World) -> None:
    def interrupt() -> None:
        if world.told and world.told[-1][1] == "shift" and len(world.kuberay.shares) > 1:
            raise KeyboardInterrupt

    world.on_wait = interrupt
    rollout = world.begin()
    with pytest.raises(KeyboardInterrupt):
        rollout.run()
    rollout.halt()
    world.on_wait = lambda: None
    at = world.kuberay.shares[-1][0]
    for _ in range(1000):
        world.wait()
    assert world.kuberay.shares[-1][0] == at
    rollout.resume()
    assert rollout.run().action == "done"
    rollout.halt()  # nothing is under way: nothing to do


def test_a_command_that_dies_at_any_point_can_be_taken_back(world: World) -> None:
    class Died(Exception): ...

    for point in range(1, 30, 3):
        world.told.clear()
        left = [point]

        def die(_: str, verdict: Verdict, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] == 0 or verdict.action == "done":
                raise Died

        world.begin()
        with pytest.raises(Died):
            world.rollout(die).run()
        other = world.rollout()
        other.back("asked for")
        assert other.run().action == "rolled-back"
        assert world.service()["spec"] == world.original["spec"]
        active = world.service()["status"]["activeServiceStatus"]["rayClusterName"]
        assert active == "c-1"
        # Its gateways' addresses are those of the next cluster.
        index = len(world.kuberay.hashes) + 1
        world.server.put("", "pods", kuberay.pod(f"gw-{index}", f"c-{index}", "gateway", f"10.0.{index}.1"))
        world.missed[f"10.0.{index}.1"] = 0.01


def test_conflicts_are_decided_anew(world: World) -> None:
    """KubeRay writes between our look and our write, every time for a while."""
    left = [12]

    def meddle(seen: Seen) -> bool:
        if seen.verb == "update" and seen.resource == "rayservices" and left[0]:
            left[0] -= 1
            world.server.change(
                "ray.io", "rayservices", NAMESPACE, NAME, lambda d: d["status"].update(lastUpdateTime=str(left[0]))
            )
        return False

    rollout = world.begin()
    world.server.faults.append(Fault(meddle))
    assert rollout.run().action == "done"
    assert left == [0]


@pytest.mark.parametrize(("status", "times"), [(0, 150), (503, 150)])
def test_an_api_server_that_is_away_for_a_while_ends_nothing(world: World, status: int, times: int) -> None:
    rollout = world.begin()
    world.server.faults.append(Fault(lambda s: len(world.kuberay.shares) > 40, status, times=times))
    assert rollout.run().action == "done"
    assert world.server.faults[0].times == 0


def test_an_api_server_that_stays_away_is_told(world: World) -> None:
    rollout = world.begin()
    world.server.faults.append(Fault(lambda s: len(world.kuberay.shares) > 40, 0, times=10**6))
    with pytest.raises(ApiUnreachable):
        rollout.run()


def test_a_last_write_whose_answer_was_lost_is_seen_as_done(world: World) -> None:
    rollout = world.begin()

    def take_and_drop(seen: Seen) -> bool:
        if seen.verb != "update" or ANNOTATION in seen.body["metadata"]["annotations"]:
            return False
        world.server.put("ray.io", "rayservices", copy.deepcopy(seen.body))
        return True

    world.server.faults.append(Fault(take_and_drop, 0))
    assert rollout.run().action == "done"
    assert world.server.faults[0].times == 0


def test_somebody_elses_version_stops_it(world: World) -> None:
    def helm_upgrade() -> None:
        if world.kuberay.shares and world.kuberay.shares[-1][0] == 25:
            head = ("spec", "rayClusterConfig", "headGroupSpec", "template", "spec")

            def change(document: Document) -> None:
                found: Any = document
                for key in head:
                    found = found[key]
                found["containers"][0]["image"] = "registry/galerne:3"

            world.server.change("ray.io", "rayservices", NAMESPACE, NAME, change)

    world.on_wait = helm_upgrade
    with pytest.raises(ClusterError, match="no longer asks for the new version"):
        world.begin().run()
    with pytest.raises(ClusterError, match="galerne:3"):
        world.rollout().back("asked for")


def test_figures_are_of_each_versions_own_gateways(world: World) -> None:
    world.begin().run()
    joined = "\n".join(world.queries)
    assert 'instance=~"(10\\\\.0\\\\.2\\\\.1):[0-9]+"' in joined
    assert 'instance=~"(10\\\\.0\\\\.1\\\\.1):[0-9]+"' in joined
    assert all(q.startswith("sum(increase(galerne_") for q in world.queries)


def test_blue_green_is_judged_after_the_switch_and_kept(blue_green: World) -> None:
    assert blue_green.begin().run().action == "done"
    assert blue_green.service()["status"]["activeServiceStatus"]["rayClusterName"] == "c-2"
    assert blue_green.service()["spec"]["upgradeStrategy"] == {"type": "NewCluster"}


def test_blue_green_goes_back_by_starting_the_old_version(blue_green: World) -> None:
    blue_green.missed["10.0.2.1"] = 0.4
    verdict = blue_green.begin().run()
    assert verdict.action == "rolled-back"
    service = blue_green.service()
    assert service["spec"] == blue_green.original["spec"]
    assert service["status"]["activeServiceStatus"]["rayClusterName"] == "c-3"


def test_blue_green_that_does_not_start_goes_back_without_a_switch(blue_green: World) -> None:
    blue_green.kuberay.fails = True

    def mend() -> None:
        state = state_of(blue_green.service())
        if state is not None and state.phase == "rolling-back":
            blue_green.kuberay.fails = False

    blue_green.on_wait = mend
    assert blue_green.begin().run().action == "rolled-back"
    assert blue_green.service()["spec"] == blue_green.original["spec"]
    assert "c-2" in blue_green.kuberay.deleted


def test_what_cannot_begin(world: World) -> None:
    rollout = world.begin()
    with pytest.raises(ClusterError, match="under way"):
        world.begin()
    rollout.back("asked for")
    rollout.run()
    with pytest.raises(ClusterError, match="no rollout is under way"):
        rollout.back("again")
    with pytest.raises(ClusterError, match="nothing to roll out"):
        rollout.start(PLAN, image_changes(world.service(), "registry/galerne:1"), "x")
    world.server.change(
        "ray.io", "rayservices", NAMESPACE, NAME, lambda d: kuberay.set_condition(d["status"], "Ready", False)
    )
    with pytest.raises(ClusterError, match="not ready"):
        world.begin()


def test_replicas_replaced_in_place_are_no_rollout() -> None:
    with pytest.raises(ClusterError, match="helm upgrade"):
        strategy_of(kuberay.service("None"))
