"""The pictures show what Prometheus answered and nothing else, and say by which engine."""

from __future__ import annotations

import json
import threading
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import pytest

from helm.dashboards.documents import ShownQuery, read
from helm.dashboards.pictures import STEPS, engine, page
from helm.dashboards.prometheus import Prometheus, Span

SPAN = Span(1000.0, 1900.0, 900 / STEPS)
SIMULATED = "max(galerne_engine_simulated)"


class Server(BaseHTTPRequestHandler):
    """Prometheus' API with the answers of a test, by query; no series for any other."""

    answers: ClassVar[dict[str, list[dict[str, Any]]]]
    asked: ClassVar[list[dict[str, str]]]

    def do_POST(self) -> None:
        parameters = dict(urllib.parse.parse_qsl(self.rfile.read(int(self.headers["content-length"])).decode()))
        self.asked.append(parameters | {"call": self.path})
        wrong = parameters["query"] == "sum("
        document = {"status": "error", "error": "parse error"} if wrong else {
            "status": "success",
            "data": {"result": self.answers.get(parameters["query"], [])},
        }  # fmt: skip
        self.send_response(400 if wrong else 200)
        self.end_headers()
        self.wfile.write(json.dumps(document).encode())

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def prometheus() -> Iterator[Prometheus]:
    Server.answers, Server.asked = {}, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield Prometheus(f"http://127.0.0.1:{server.server_address[1]}/")
    server.shutdown()
    thread.join()
    server.server_close()


def test_an_answer_keeps_its_numbers_and_gets_its_name(prometheus: Prometheus) -> None:
    metric = {"model": "m", "outcome": "failed"}
    Server.answers = {"x": [{"metric": metric, "values": [[1000, "1"], [1010, "NaN"], [1020, "+Inf"], [1030, "2.5"]]}]}
    (series,) = prometheus.ask(ShownQuery("x", "{{model}}: {{outcome}}", instant=False), SPAN)
    assert (series.name, series.points) == ("m: failed", ((1000.0, 1.0), (1030.0, 2.5)))
    assert Server.asked == [
        {"call": "/api/v1/query_range", "query": "x", "start": "1000.0", "end": "1900.0", "step": "10.0"}
    ]
    assert prometheus.ask(ShownQuery("y", "", instant=True), SPAN) == ()
    with pytest.raises(ValueError, match="parse error"):
        prometheus.ask(ShownQuery("sum(", "", instant=True), SPAN)


def test_the_engine_is_named(prometheus: Prometheus) -> None:
    assert engine(prometheus) == "real vLLM engines"
    Server.answers = {SIMULATED: [{"metric": {}, "value": [1000, "1"]}]}
    assert "simulated" in engine(prometheus)


def test_a_page_draws_what_was_answered_and_says_where_nothing_was(prometheus: Prometheus) -> None:
    overview = next(d for d in read(900, 60) if d.uid == "galerne-overview")
    panels = {panel.title: panel for panel in overview.panels}
    number, line = panels["Alerts that fire"].queries[0], panels["Replicas ready"].queries[0]
    name = {"model": "<b>m</b>"}
    Server.answers = {
        number.expr: [{"metric": {}, "value": [1900, "3.25"]}],
        line.expr: [{"metric": name, "values": [[1000, "1"], [1450, "2"], [1900, "3"]]}],
    }
    text = page(overview, prometheus, SPAN, "a run <i>")
    assert ">3.25 <" in text
    assert "&lt;b&gt;m&lt;/b&gt;" in text
    assert "<b>m</b>" not in text
    assert "a run &lt;i&gt;" in text
    drawn = [panel for panel in overview.panels if panel.kind != "row"]
    assert text.count("<figure>") == len(drawn)
    assert text.count("Nothing to show.") == len(drawn) - 2
    # Every query of the file was asked, lines over the whole time and numbers at its end.
    assert {one["query"] for one in Server.asked} == {q.expr for panel in drawn for q in panel.queries}
    assert {one.get("time", "1900.0") for one in Server.asked} == {"1900.0"}


def test_bars_of_nothing_take_no_colour_from_others(prometheus: Prometheus) -> None:
    tenant = next(d for d in read(900, 60) if d.uid == "galerne-tenant")
    panels = {panel.title: panel for panel in tenant.panels}
    stacked, sums = panels["Refusals by quota"].queries[0], panels["Refusals in the time shown"].queries[0]
    rows = [({"tenant": f"t{n}", "limit": "day"}, str(n)) for n in range(4)]
    Server.answers = {
        stacked.expr: [{"metric": metric, "values": [[1000, "0"], [1010, value]]} for metric, value in rows],
        sums.expr: [{"metric": {"tenant": "t", "code": "c"}, "value": [1900, "41.6"]}],
    }
    text = page(tenant, prometheus, SPAN, "")
    assert "Left out: 1 that stay at 0." in text
    assert "t0 day" not in text
    assert all(f"t{n} day" in text for n in (1, 2, 3))
    # As wide as the page, with letters as large as elsewhere; and what is counted is whole.
    assert text.count('viewBox="0 0 760 240"') == 1
    assert "t c: 42 " in text
    for row in Server.answers[stacked.expr]:
        row["values"] = [[1000, "0"]]
    assert "t0 day" in page(tenant, prometheus, SPAN, "")
