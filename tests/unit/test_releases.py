"""Two releases that one Prometheus watches are never added up: every expression names a release, or groups by it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from helm.dashboards.documents import DIRECTORY
from serving.api.ops import cluster as ops
from serving.autoscaling.signals import query_of
from serving.config_file import load
from serving.metrics import alerts, rules, targets
from serving.metrics.release import LABEL, groupings, matcher, matcher_of, scoped
from tests.unit.kubernetes import kuberay

RELEASE = "prod/galerne"
ONE = matcher(RELEASE)
CONFIG = """\
models: [{id: m, source: "fake:m"}]
tenants: [{id: t, keys: [{id: k, sha256: "%s"}]}]
""" % ("0" * 64)

# What this test knows of PromQL is its own: a metric's name, wherever it stands but as a label.
METRIC = re.compile(
    r"(?<![\w:$])(?:galerne:|model:galerne|galerne_|vllm:|haproxy_|process_|kube_|ray_)[\w:]*|\b(?:up|ALERTS)\b"
)
LISTS = re.compile(r"\b(?:by|on|without|ignoring|group_left|group_right) ?\([^)]*\)")
TEXT = re.compile(r'"(?:[^"\\]|\\.)*"')
AGGREGATION = re.compile(r"(?<![\w:])(?:sum|min|max|avg|count|group|topk|bottomk|stddev|quantile)\b ?(\w+ ?\([^)]*\))?")


def unnamed(expr: str, only: str) -> list[str]:
    """Selectors of an expression that mean no release."""
    bare = LISTS.sub("", TEXT.sub('""', expr.replace(only, "ONLY")))
    names = [name for name in METRIC.finditer(bare) if not in_braces(bare, name.start())]
    braces = re.findall(r"\{[^}]*\}", bare)
    return [name[0] for name in names if bare[name.end() : name.end() + 1] != "{"] + [
        b for b in braces if "ONLY" not in b
    ]


def in_braces(text: str, at: int) -> bool:
    return text.rfind("{", 0, at) > text.rfind("}", 0, at)


def recorded() -> Iterator[tuple[str, str]]:
    for rule in (*rules.RULES, *rules.SLOW_RULES):
        yield rule.record, rule.document(ONE)["expr"]
    for alert in alerts.ALERTS:
        yield alert.name, alert.document(ONE)["expr"]


def test_a_selector_without_its_release_is_found() -> None:
    # Else the tests below would show nothing.
    for expr, missing in (
        ("sum(up)", 1),
        ('sum by (model) (vllm:x{a="{"}) / galerne_y', 2),
        ('{__name__=~"a|b"}', 1),
        (f"sum by (galerne_release) (up{{{ONE}}})", 0),
        (f"rate(galerne_z[5m]) > on (galerne_release) galerne_y{{{ONE}}}", 1),
    ):
        assert len(unnamed(expr, ONE)) == missing, expr


@pytest.mark.parametrize(("name", "expr"), list(recorded()), ids=lambda v: v[:60])
def test_rules_and_alerts_name_the_release_and_group_by_it(name: str, expr: str) -> None:
    assert unnamed(expr, ONE) == []
    for word, labels in groupings(expr):
        assert LABEL in labels or word in {"group_left", "group_right"}, f"{name}: {word} {set(labels)}"
    # Nothing is summed without a word on what is kept apart.
    for found in AGGREGATION.finditer(TEXT.sub('""', expr)):
        assert str(found[1]).startswith("by"), f"{name}: {found[0]}"
    assert "without" not in expr
    assert "ignoring" not in expr


def shown(part: Any) -> Iterator[str]:
    """Every expression of a dashboard's file."""
    if isinstance(part, dict):
        yield from (
            part[key] for key in ("expr", "query") if isinstance(part.get(key), str) and part.get(key) != "prometheus"
        )
    for inner in part.values() if isinstance(part, dict) else part if isinstance(part, list) else ():
        yield from shown(inner)


@pytest.mark.parametrize("path", sorted(DIRECTORY.glob("*.json")), ids=lambda p: p.stem)
def test_dashboards_show_one_release(path: Path) -> None:
    document = json.loads(path.read_text())
    chosen = f"label_values(galerne_build_info, {LABEL})"
    found = [expr for expr in shown(document) if expr != chosen and METRIC.search(expr)]
    assert len(found) > 5
    for expr in found:
        assert unnamed(expr.replace("label_values", ""), f'{LABEL}="$release"') == [], expr
    (variable,) = [v for v in document["templating"]["list"] if v["name"] == "release"]
    # All of them would be added up again.
    assert (variable["query"], variable["multi"], variable["includeAll"]) == (chosen, False, False)


def test_what_the_scaler_and_the_ops_page_ask_is_of_their_release() -> None:
    for release in (RELEASE, ""):
        for expr in (query_of(release), *ops.queries(release).values()):
            assert unnamed(expr, matcher(release)) == []


SCOPED = (
    ("up", "up{R}"),
    ("up == 1", "up{R} == 1"),
    ('sum by (model) (rate(vllm:x_total{a="b",}[5m]))', 'sum by (model) (rate(vllm:x_total{a="b",R}[5m]))'),
    ("sum(a) by (job, up) / on (up) group_left (model) b", "sum(a{R}) by (job, up) / on (up) group_left (model) b{R}"),
    ('{__name__=~"up|down"}[1h:30s]', '{__name__=~"up|down",R}[1h:30s]'),
    ("a offset 30m and 1e3 > bool b[$__range] or Inf", "a{R} offset 30m and 1e3 > bool b{R}[$__range] or Inf"),
    ("a{x='}'} # a comment, up", "a{x='}',R} # a comment, up"),
    ('label_replace(a, "up", "b", "", "")', 'label_replace(a{R}, "up", "b", "", "")'),
    ("histogram_quantile(0.95, sum by (le) (a_bucket)) >= 0", "histogram_quantile(0.95, sum by (le) (a_bucket{R})) >= 0"),
    ("time() - a > 5.5 unless absent(b{})", "time() - a{R} > 5.5 unless absent(b{R})"),
    ("a{galerne_release=\"x\"}", "a{galerne_release=\"x\"}"),
)  # fmt: skip


@pytest.mark.parametrize(("expr", "expected"), SCOPED, ids=lambda v: v[:30])
def test_every_selector_gets_the_matcher_and_nothing_else(expr: str, expected: str) -> None:
    assert scoped(expr, ONE) == expected.replace("R}", ONE + "}")
    assert scoped(scoped(expr, ONE), ONE) == scoped(expr, ONE)


def test_a_name_cannot_leave_its_matcher() -> None:
    assert matcher('a"} or up{x="') == 'galerne_release="a\\"} or up{x=\\""'
    assert matcher_of(()) == 'galerne_release=~".*"'
    assert matcher_of(("a/b", "a/b")) == 'galerne_release="a/b"'
    assert matcher_of(("b/c.d", "")) == 'galerne_release=~"|b/c[.]d"'


def test_targets_carry_the_release_and_none_without_a_name() -> None:
    assert targets.gateway_row("10.0.0.1", 9400, RELEASE)["labels"] == {"job": "galerne-gateway", LABEL: RELEASE}
    assert targets.engine_row("::1", 1, "m", "r", RELEASE)["labels"][LABEL] == RELEASE
    assert LABEL not in targets.gateway_row("10.0.0.1", 9400)["labels"]


def test_the_name_is_the_files_or_the_environments(tmp_path: Path) -> None:
    path = tmp_path / "galerne.yaml"
    path.write_text(CONFIG)
    assert load(path, {}).release == ""
    assert load(path, {"GALERNE_RELEASE": RELEASE}).release == RELEASE
    path.write_text(CONFIG + "release: mine\n")
    assert load(path, {"GALERNE_RELEASE": RELEASE}).release == "mine"


def test_a_rayservice_tells_its_release() -> None:
    from serving.cluster.kubernetes.resources import release_of

    service = kuberay.service()
    assert release_of(service) == kuberay.RELEASE
    del service["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["containers"][0]["env"]
    assert release_of(service) == ""
    assert yaml.safe_load(CONFIG)["models"]
