"""The chart's dashboards are what the code generates, valid for Grafana, and tell an operator what they show."""

from __future__ import annotations

import gzip
import json
import os
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from helm.dashboards.catalogue import DASHBOARDS
from helm.dashboards.documents import DIRECTORY, filled, read
from helm.dashboards.grafana import RUNBOOK_VARIABLE, TAG, document, files
from helm.dashboards.panels import Panel, query
from serving.metrics import alerts, rules
from serving.metrics.release import LABEL
from serving.metrics.table import TABLE

ROOT = Path(__file__).parents[2]
SCHEMA = (
    Path(os.environ.get("GALERNE_SHARED", ROOT.parent / "shared")) / "crds" / "grafana-dashboard.jsonschema.json.gz"
)
# A sentence or two; less says no more than the title.
LEAST_DESCRIPTION = 25
SHOWN = read(900, 60)
PANELS = [(d, p) for d in SHOWN for p in d.panels if p.kind != "row"]
EACH_PANEL = pytest.mark.parametrize(("dashboard", "panel"), PANELS, ids=lambda v: getattr(v, "title", None))
EACH = pytest.mark.parametrize("dashboard", SHOWN, ids=lambda d: d.uid)


def test_the_files_are_what_the_code_generates() -> None:
    written = {path.name: path.read_text() for path in DIRECTORY.iterdir() if not path.name.startswith(".")}
    assert written == files(DASHBOARDS), "run `make dashboards`"


def test_the_same_facts_give_the_same_bytes() -> None:
    assert [document(d) for d in DASHBOARDS] == [document(d) for d in DASHBOARDS]


@pytest.fixture(scope="module")
def validator() -> Any:
    if not SCHEMA.is_file():
        pytest.skip(
            f"Grafana's dashboard schema is not here ({SCHEMA.name}, see GALERNE_SHARED): dashboards NOT validated"
        )
    kind = jsonschema.Draft7Validator
    return kind(json.loads(gzip.decompress(SCHEMA.read_bytes())))


@EACH
def test_grafanas_schema(dashboard: Any, validator: Any) -> None:
    found = sorted(validator.iter_errors(dashboard.document), key=str)
    assert [f"{'/'.join(map(str, e.absolute_path))}: {e.message[:200]}" for e in found] == []


def test_the_schema_would_find_a_misspelt_field(validator: Any) -> None:
    broken = SHOWN[0].document | {"titel": "x"}
    assert not validator.is_valid(broken)


@EACH_PANEL
def test_every_panel_tells_what_it_shows(dashboard: Any, panel: Any) -> None:
    assert panel.unit
    assert len(panel.description.split()) >= 5
    assert len(panel.description) >= LEAST_DESCRIPTION
    assert panel.queries
    assert all(q.legend for q in panel.queries)
    assert panel.document["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    assert [t["refId"] for t in panel.document["targets"]] == sorted({t["refId"] for t in panel.document["targets"]})
    # Whoever is woken finds the section.
    headings = {line[3:].lower() for line in (ROOT / alerts.RUNBOOK).read_text().splitlines() if line.startswith("## ")}
    for link in panel.document.get("links", ()):
        where, _, section = link["url"].partition("#")
        assert where == f"${{{RUNBOOK_VARIABLE}}}"
        assert section in headings
        assert f"{alerts.RUNBOOK}#{section}" in panel.description


@EACH_PANEL
def test_queries_speak_of_metrics_that_exist(dashboard: Any, panel: Any) -> None:
    ours = {
        f"{row.name}{suffix}"
        for row in TABLE
        for suffix in {"counter": ("_total",), "gauge": ("",)}.get(row.kind, ("_bucket", "_sum", "_count"))
    }
    recorded = {r.record for r in (*rules.RULES, *rules.SLOW_RULES)}
    for one in panel.queries:
        assert "$" not in one.expr
        assert set(re.findall(r"(?<![:\w\"-])galerne_\w+", one.expr)) <= ours | {LABEL}, one.expr
        assert set(re.findall(r"\b(?:model|galerne):galerne_?[\w:]*", one.expr)) <= recorded, one.expr


@EACH
def test_panels_fill_the_grid_without_overlap(dashboard: Any) -> None:
    taken: set[tuple[int, int]] = set()
    ids = [p.document["id"] for p in dashboard.panels]
    assert len(ids) == len(set(ids))
    for panel in dashboard.panels:
        x, y, width, height = panel.place
        cells = {(i, j) for i in range(x, x + width) for j in range(y, y + height)}
        assert not cells & taken, panel.title
        assert x + width <= 24
        taken |= cells
    for row in {j for _, j in taken}:
        assert len([1 for _, j in taken if j == row]) in {24}, f"line {row} has a gap"


@EACH
def test_variables_links_and_annotations(dashboard: Any) -> None:
    listed = {v["name"]: v for v in dashboard.document["templating"]["list"]}
    assert {"datasource", "model", RUNBOOK_VARIABLE} <= set(listed)
    assert ("tenant" in listed) == (dashboard.uid == "galerne-tenant")
    for name in {"model", "tenant"} & set(listed):
        assert listed[name]["includeAll"]
        assert listed[name]["multi"]
        assert listed[name]["allValue"] == ".+"
    # What a query asks for is a variable of its dashboard.
    asked = set(re.findall(r"\$\{?([a-z]+)\}?", json.dumps(dashboard.document["panels"])))
    assert asked <= set(listed)
    (link,) = dashboard.document["links"]
    assert (link["tags"], link["includeVars"], link["keepTime"]) == ([TAG], True, True)
    assert TAG in dashboard.document["tags"]
    (annotation,) = dashboard.document["annotations"]["list"]
    assert "ALERTS" in annotation["expr"]


def test_every_alert_that_can_fire_is_linked_from_a_panel() -> None:
    linked = {link["url"].partition("#")[2] for _, p in PANELS for link in p.document.get("links", ())}
    assert linked == {a.name.lower() for a in alerts.ALERTS}


def test_uids_and_titles_are_unique() -> None:
    assert len({d.uid for d in SHOWN}) == len({d.title for d in SHOWN}) == len(DASHBOARDS) == 5


def test_filling_in_variables() -> None:
    values = {"model": ".+", "__range": "900s"}
    assert filled('increase(x{m=~"$model"}[$__range]) / ${model}', values) == 'increase(x{m=~".+"}[900s]) / .+'
    with pytest.raises(KeyError):
        filled("$tenant", values)


def test_a_panel_about_an_unknown_alert_is_refused() -> None:
    with pytest.raises(ValueError, match="GalerneNothing"):
        Panel("t", "d", "s", query("x"), alerts=("GalerneNothing",))


def test_the_product_does_not_import_them() -> None:
    for package in ("serving", "deployments", "loadtest"):
        for path in (ROOT / package).rglob("*.py"):
            assert not re.search(r"^\s*(from|import) (helm|grafana_foundation_sdk)\b", path.read_text(), re.M), path
