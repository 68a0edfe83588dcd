"""The ops page in a real browser, before a real gateway with a simulated engine and a scripted Prometheus."""

from __future__ import annotations

import asyncio
import json
import threading
import time
import urllib.parse
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from serving.api.app import Gateway
from serving.api.auth import digest
from serving.api.ops.app import POLICY
from serving.api.ops.cluster import queries
from serving.config import FakeEngineConfig, GalerneConfig
from serving.engine.fake import build_app
from serving.engine.private_server import PrivateServer
from serving.metrics.gateway import GatewayMetrics
from serving.routing.replicas import Endpoint
from tests.browser import Page, page
from tests.integration.running import ADMIN_KEY, KEY, RunningCluster
from tests.system_parts import required
from tests.unit.test_ops import ANSWERS

ADMIN, TENANT = "sk-admin-0123", "sk-tenant-0123"
CHAT = {"model": "chat", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4, "stream": True}
HOSTILE = "<img src=x onerror=alert(1)>"
PHONE_WIDTH = 390
pytestmark = pytest.mark.timeout(400)


@contextmanager
def prometheus() -> Iterator[str]:
    """Answers every query of the page as `ANSWERS` has it."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            query = urllib.parse.parse_qs(urllib.parse.urlsplit(self.path).query)["query"][0]
            name = next(n for n, q in queries("").items() if q == query)
            body = json.dumps({"status": "success", "data": {"result": ANSWERS[name]}}).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Tests are silent."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join(5)


@asynccontextmanager
async def gateway() -> AsyncIterator[str]:
    """A gateway that has served two requests of a tenant and refused one."""
    with prometheus() as url:
        config = GalerneConfig.model_validate(
            {
                "models": [
                    {
                        "id": "chat",
                        "source": "fake:chat",
                        "slo": {"ttft_p95_s": 60.0},
                        "replicas": {"min": 0, "max": 4},
                        "autoscaling": {},
                    },
                    {
                        "id": "vectors",
                        "source": "fake:vectors",
                        "task": "embed",
                        "replicas": {"min": 0, "max": 2},
                        "autoscaling": {},
                    },
                ],
                "tenants": [{"id": "press", "keys": [{"id": "desk", "sha256": digest(TENANT)}]}],
                "admins": [{"id": "nadia", "sha256": digest(ADMIN)}],
                "prometheus": {"url": url},
            }
        )
        app = Gateway(config, engine_token="t", metrics=GatewayMetrics(time.monotonic))
        fake = build_app(FakeEngineConfig(decode_ms=1), "chat")
        await fake.start()
        engine = PrivateServer(fake, host="127.0.0.1", token="t")
        await engine.start()
        # What a replica is called comes from the cluster; the page must show it as text all the same.
        app.update_replicas(
            "chat", (Endpoint("r1", engine.host, engine.port), Endpoint(HOSTILE, engine.host, engine.port))
        )
        front = PrivateServer(app, host="127.0.0.1", token="")
        await front.start()
        address = f"http://127.0.0.1:{front.port}"
        try:
            async with httpx.AsyncClient(base_url=address, headers={"authorization": f"Bearer {TENANT}"}) as client:
                for body in (CHAT, CHAT, CHAT | {"n": 1000}):
                    await client.post("/v1/chat/completions", json=body)
            yield address
        finally:
            app.close()
            await front.stop()
            await engine.stop()


async def in_browser(profile: Path, drive: Callable[[Page, str], None]) -> None:
    def run(address: str) -> None:
        with page(profile) as tab:
            drive(tab, address)

    async with gateway() as address:
        await asyncio.to_thread(run, address)


def text(tab: Page) -> str:
    return str(tab.value("document.body.innerText"))


def enter(tab: Page, key: str) -> None:
    tab.value("document.getElementById('key').focus()")
    tab.type(key)
    tab.press_enter()


async def test_an_admin_opens_it_sees_the_cluster_and_locks_it(tmp_path: Path) -> None:
    def drive(tab: Page, address: str) -> None:
        tab.size(1280, 900)
        tab.open(f"{address}/ops")
        assert "chat" not in text(tab)
        enter(tab, ADMIN)
        tab.until("!document.getElementById('view').hidden")
        # What Prometheus says comes with a later refresh, without anybody's doing.
        tab.until("document.body.innerText.includes('1 → 3')")
        shown = text(tab)
        for part in ("asleep", "r1", "demand, rate", "400: 1", "2 gateways", "75.0 %", "simulated", "1,000"):
            assert part in shown, part
        assert HOSTILE in shown
        assert tab.value("document.querySelectorAll('img').length") == 0
        # Nothing is stored, nothing is in the address, and no request but to this gateway was made.
        assert tab.value("[document.cookie, Object.keys(localStorage).length, Object.keys(sessionStorage).length]") == [
            "",
            0,
            0,
        ]
        assert tab.value("document.documentElement.outerHTML").find(ADMIN) == -1
        assert tab.value("document.getElementById('key').value") == ""
        assert all(url.startswith(address) and ADMIN not in url for url in tab.requests), tab.requests
        tab.value("document.getElementById('lock').click()")
        assert "press" not in text(tab)
        assert tab.value("document.getElementById('door').hidden") is False
        tab.open(f"{address}/ops")
        assert "press" not in text(tab)
        # The favicon that browsers ask for by themselves is no route.
        assert [c for c in tab.complaints if "404" not in c and "401" not in c] == []

    await in_browser(tmp_path, drive)


async def test_a_tenants_key_and_a_wrong_one_are_refused_with_a_reason(tmp_path: Path) -> None:
    def drive(tab: Page, address: str) -> None:
        tab.open(f"{address}/ops")
        enter(tab, TENANT)
        tab.until("document.getElementById('status').textContent.includes('tenant')")
        enter(tab, "sk-wrong")
        tab.until("document.getElementById('status').textContent.includes('not valid')")
        enter(tab, "schlüssel")
        tab.until("document.getElementById('status').textContent.includes('plain letters')")
        assert tab.value("document.getElementById('view').hidden") is True
        assert "chat" not in text(tab)

    await in_browser(tmp_path, drive)


async def test_the_policy_stops_a_script_that_is_not_ours(tmp_path: Path) -> None:
    def drive(tab: Page, address: str) -> None:
        tab.open(f"{address}/ops")
        injected = (
            "(() => { const s = document.createElement('script');"
            " try { s.textContent = 'window.stolen = 1'; document.body.append(s); } catch { window.refused = 1; } })()"
        )
        tab.value(injected)
        assert tab.value("window.stolen === undefined") is True
        assert (
            tab.value(
                "(() => { try { document.body.innerHTML = '<p>x</p>'; return 'set'; } catch { return 'refused'; } })()"
            )
            == "refused"
        )
        assert tab.value("fetch('http://127.0.0.1:9/').then(() => 'sent', () => 'refused')") == "refused"
        tab.until("true")
        assert any("Content Security Policy" in c or "TrustedScript" in c for c in tab.complaints), tab.complaints

    await in_browser(tmp_path, drive)


@pytest.mark.parametrize(("scheme", "dark"), [("light", False), ("dark", True)])
async def test_it_fits_a_phone_and_follows_its_colours(tmp_path: Path, scheme: str, dark: bool) -> None:
    def drive(tab: Page, address: str) -> None:
        tab.size(PHONE_WIDTH, 844, phone=True)
        tab.scheme(scheme)
        tab.open(f"{address}/ops")
        enter(tab, ADMIN)
        tab.until("document.body.innerText.includes('1 → 3')")
        # Wide tables scroll by themselves; the page does not.
        assert tab.value("document.documentElement.scrollWidth") == PHONE_WIDTH
        red, green, blue = json.loads(
            tab.value("'[' + getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).join() + ']'")
        )
        assert (red + green + blue < 3 * 64) is dark
        tab.screenshot(tmp_path / f"{scheme}.png", whole=True)
        assert (tmp_path / f"{scheme}.png").stat().st_size > 10_000

    await in_browser(tmp_path, drive)


@pytest.mark.cluster
def test_through_the_real_front_it_tells_of_the_whole_cluster(fake_cluster: RunningCluster) -> None:
    with httpx.Client(base_url=fake_cluster.url, timeout=30) as client:
        shell = client.get("/ops")
        assert shell.status_code == 200
        assert shell.headers["content-security-policy"] == POLICY
        assert client.get("/ops/state").status_code == 401
        assert client.get("/ops/state", headers={"authorization": f"Bearer {KEY}"}).status_code == 403
        admin = {"authorization": f"Bearer {ADMIN_KEY}"}
        assert client.get("/v1/models", headers=admin).status_code == 401
        body = {k: v for k, v in CHAT.items() if k != "stream"}
        assert (
            client.post("/v1/chat/completions", json=body, headers={"authorization": f"Bearer {KEY}"}).status_code
            == 200
        )
        state = client.get("/ops/state", headers=admin).json()
        chat = next(m for m in state["models"] if m["id"] == "chat")
        assert {r["id"] for r in chat["replicas"]} == {e["replica_id"] for e in fake_cluster.state()["engines"]["chat"]}
        assert next(t for t in state["tenants"] if t["id"] == "press-agency")["requests"] >= 1
        required("prometheus")
        deadline_s = time.monotonic() + 120
        while not (state["gateway"]["of"] == 1 and all("running" in r["cluster"] for r in chat["replicas"])):
            assert time.monotonic() < deadline_s, state
            time.sleep(1)
            state = client.get("/ops/state", headers=admin).json()
            chat = next(m for m in state["models"] if m["id"] == "chat")
        assert state["prometheus"]["problem"] == ""
        assert state["prometheus"]["age_s"] < 60
