"""Each dashboard's data as a picture, for readers who have no Grafana at hand.

`python -m helm.dashboards.pictures --prometheus URL` asks a running Prometheus every query of the shipped files, draws
the answers in the dashboards' own layout (plots of `loadtest.reports`) and has Chromium take the picture. What is drawn
was measured; the picture says by which engine, and a panel without data says so. It is not what Grafana looks like.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Final

from PIL import Image

from helm.dashboards.documents import ShownDashboard, ShownPanel, read
from helm.dashboards.panels import BYTES, BYTES_PER_S, COUNT, HALF, HOURS, REQUESTS_PER_S, SECONDS, SHARE, YES_NO
from helm.dashboards.prometheus import Answered, Prometheus, Span
from loadtest.reports.svg import COLOURS, Curve, Guide, Plot, figure
from loadtest.reports.svg import WIDTH as HALF_PLOT
from loadtest.reports.text import escaped, number

OUT: Final = Path("docs/dashboards")
STEPS: Final = 90
WIDTH_PX: Final = 1200
LEAST_PX: Final = 400
CHROMIUM_S: Final = 120
PALETTE: Final = 128
_OPTIONS: Final = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars")
# Chromium's picture is as high as its window. So the page is asked first how high it is.
_HEIGHT: Final = "<script>document.documentElement.dataset.height = document.documentElement.scrollHeight</script>"
_UNITS: Final = {
    SECONDS: (1.0, "s"),
    HOURS: (1.0, "h"),
    SHARE: (100.0, "%"),
    REQUESTS_PER_S: (1.0, "requests/s"),
    BYTES: (1e-6, "MB"),
    BYTES_PER_S: (1e-3, "kB/s"),
    COUNT: (1.0, ""),
    YES_NO: (1.0, "1: yes"),
}
_STYLE: Final = """
body { max-width: none; padding: 1rem; } :root { color-scheme: light; }
.grid24 { display: grid; grid-template-columns: repeat(24, 1fr); gap: .6rem; align-items: start; }
.grid24 > h2 { grid-column: span 24; margin: 1rem 0 0; }
.number { font-size: 2rem; font-weight: 600; margin: .3rem 0; }
.bars { list-style: none; margin: .4rem 0; padding: 0; } .bars li { margin: .2rem 0; }
.bars i { display: block; height: .55rem; background: var(--c0); } .unit { color: var(--soft); font-weight: 400; }
"""


def page(dashboard: ShownDashboard, prometheus: Prometheus, span: Span, told: str) -> str:
    """The dashboard as one HTML page that needs nothing else."""
    parts = []
    for panel in dashboard.panels:
        if panel.kind == "row":
            parts.append(f"<h2>{escaped(panel.title)}</h2>")
        else:
            answers = [series for query in panel.queries for series in prometheus.ask(query, span)]
            shown = _drawn(panel, [one for one in answers if one.points], span)
            parts.append(f'<div style="grid-column: span {panel.place[2]}">{shown}</div>')
    css = resources.files("loadtest.reports").joinpath("report.css").read_text(encoding="utf-8")
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><style>{css}{_STYLE}</style></head><body>'
        f'<h1>{escaped(dashboard.title)}</h1><p class="soft">{escaped(told)}</p>'
        f'<div class="grid24">{"".join(parts)}</div></body></html>\n'
    )


def _drawn(panel: ShownPanel, answers: Sequence[Answered], span: Span) -> str:
    factor, unit = _UNITS.get(panel.unit, (1.0, panel.unit.removeprefix("suffix: ")))
    if panel.kind == "timeseries":
        return figure(_plot(panel, answers, span, factor, unit))
    title = f"<figcaption>{escaped(panel.title)}</figcaption>"
    if not answers:
        return f'<figure>{title}<p class="none">Nothing to show.</p></figure>'
    if panel.kind == "stat":
        value = number(answers[0].points[-1][1] * factor, 3)
        return f'<figure>{title}<p class="number">{value} <span class="unit">{escaped(unit)}</span></p></figure>'
    # An increase is an estimate between scrapes, of things that are whole.
    whole = panel.unit == COUNT
    values = sorted(((one.points[-1][1] * factor, one.name) for one in answers), reverse=True)
    most = max(values[0][0], 1e-9)
    bars = "".join(
        f"<li>{escaped(name)}: {number(round(value) if whole else value, 3)} {escaped(unit)}"
        f'<i style="width:{max(0.5, 100 * value / most):.1f}%"></i></li>'
        for value, name in values[:COLOURS]
    )
    return f'<figure>{title}<ul class="bars">{bars}</ul></figure>'


def _plot(panel: ShownPanel, answers: Sequence[Answered], span: Span, factor: float, unit: str) -> Plot:
    """The lines of a panel; those beyond what can be told apart are left out, the smallest first, and counted.

    So are bars of nothing beside others: the colours are for those that can be seen.
    """
    stacked = panel.document["fieldConfig"]["defaults"]["custom"].get("stacking", {}).get("mode") == "normal"
    ranked = sorted(answers, key=lambda one: -max(value for _, value in one.points))
    seen = [one for one in ranked if any(value for _, value in one.points)] if stacked else ranked
    shown = (seen or ranked)[:COLOURS]
    times = [span.start_s + index * span.step_s for index in range(STEPS + 1)]
    curves = []
    for one in sorted(shown, key=lambda one: one.name):
        known = {round((at - span.start_s) / span.step_s): value * factor for at, value in one.points}
        points = tuple(
            ((at - span.start_s) / 60, known.get(index, 0.0 if stacked else None)) for index, at in enumerate(times)
        )
        curves.append(Curve(one.name, points))
    steps = panel.document["fieldConfig"]["defaults"]["thresholds"]["steps"]
    nothing = len(ranked) - len(seen or ranked)
    hidden = len(ranked) - nothing - len(shown)
    left_out = [f"{nothing} that stay at 0"] * bool(nothing) + [f"{hidden} smaller ones"] * bool(hidden)
    return Plot(
        panel.title,
        "minutes",
        unit,
        curves,
        f"Left out: {', '.join(left_out)}." if left_out else "",
        bar_width=span.step_s / 60 * 0.95 if stacked else None,
        guides=[Guide("worry", step["value"] * factor) for step in steps if step["value"] is not None],
        # As wide as its place in the layout, so that letters have one size.
        width=round(HALF_PLOT * panel.place[2] / HALF),
    )


def engine(prometheus: Prometheus) -> str:
    """What computed the answers, in words."""
    if prometheus.value("max(galerne_engine_simulated)"):
        return (
            "simulated engines (their latencies are of no model); HAProxy, gateway, Ray Serve and Prometheus are real"
        )
    return "real vLLM engines"


def photograph(html: str, to: Path) -> None:
    """A page as a PNG; raises FileNotFoundError without Chromium, ValueError where it does not show the page."""
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if program is None:
        raise FileNotFoundError("Chromium is not installed (Debian: apt-get install chromium)")
    with tempfile.TemporaryDirectory() as directory:
        source = Path(directory) / "page.html"
        source.write_text(html.replace("</body>", f"{_HEIGHT}</body>"), encoding="utf-8")

        def chromium(height_px: int, *options: str) -> str:
            command = [program, *_OPTIONS, f"--user-data-dir={directory}/user", f"--window-size={WIDTH_PX},{height_px}"]
            done = subprocess.run(  # noqa: S603 - the program found on PATH, on a page of ours
                [*command, *options, source.as_uri()], check=True, capture_output=True, text=True, timeout=CHROMIUM_S
            )
            return done.stdout

        found = re.search(r'data-height="(\d+)"', chromium(LEAST_PX, "--dump-dom"))
        if found is None:
            raise ValueError("Chromium did not tell how high the page is")
        chromium(int(found[1]), f"--screenshot={directory}/page.png")
        # Plots have few colours: a third of the bytes.
        with Image.open(f"{directory}/page.png") as image:
            # By the colours that there are, not by how often: a thin line keeps its own.
            few = image.convert("RGB").quantize(PALETTE, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
            few.save(to, optimize=True)


def take(url: str, range_s: int, out: Path) -> list[Path]:
    """A picture of every dashboard over the newest `range_s` seconds; returns the files."""
    prometheus, now_s = Prometheus(url), time.time()
    span = Span(now_s - range_s, now_s, range_s / STEPS)
    when = datetime.fromtimestamp(now_s, UTC).strftime("%Y-%m-%d %H:%M UTC")
    told = f"The {range_s / 60:g} minutes before {when}, from Prometheus. Answered by {engine(prometheus)}."
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for dashboard in read(range_s, max(60, round(4 * span.step_s))):
        path = out / f"{dashboard.uid.removeprefix('galerne-')}.png"
        photograph(page(dashboard, prometheus, span, told), path)
        written.append(path)
    return written


def main(arguments: Sequence[str] | None = None) -> int:
    """Take the pictures; 1 where it cannot be done."""
    parser = argparse.ArgumentParser(
        prog="python -m helm.dashboards.pictures", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--prometheus", required=True, metavar="URL")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args(arguments)
    try:
        for path in take(given.prometheus, round(given.minutes * 60), given.out):
            print(path)
    except (OSError, ValueError, subprocess.SubprocessError) as problem:
        print(f"no picture: {problem}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
