"""Plots as inline SVG, drawn here because no plotting library is among the locked packages.

What a report needs is small: lines and stacked bars on labelled axes. A library would bring megabytes of scripts and
its own opinions about the network. A plot is drawn at the width of a phone's screen and never scaled far from it, so
its text stays readable there; wide screens show several side by side. Colours are classes that the page's style
sheet defines, for light, dark and print; lines differ in dashes too. Every name is escaped here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from loadtest.reports.series import Point
from loadtest.reports.text import escaped, number

WIDTH, HEIGHT = 380, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 10, 36
# Distinct colours there are; more curves than this belong into one called "others".
COLOURS = 8
# Marks that answer the pointer, on each curve; more would only weigh.
_MOST_TIPS = 60
_LONGEST_NAME = 60
_DECADE = 10.0
# With fewer whole decades than this a logarithmic axis also names 2 and 5.
_FEW_DECADES = 3


@dataclass(frozen=True, slots=True)
class Curve:
    """A line through points; a None value is a gap."""

    name: str
    points: Sequence[Point]
    # Holds each value until the next point, as counts do.
    steps: bool = False
    # Marks each point: for few points that are measurements of their own.
    marked: bool = False


@dataclass(frozen=True, slots=True)
class Guide:
    """A target: a dashed line across the plot at a value of the x or y axis."""

    name: str
    at: float
    vertical: bool = False


@dataclass(frozen=True, slots=True)
class Plot:
    """All that is drawn; `stacked` draws the curves as bars on top of each other, which share their x values."""

    title: str
    x_label: str
    y_label: str
    curves: Sequence[Curve]
    # What the plot shows and leaves out, in a sentence.
    note: str = ""
    log_x: bool = False
    # The y axis ends here at least.
    y_least_top: float = 0.0
    # Of stacked bars.
    bar_width: float | None = None
    guides: Sequence[Guide] = ()
    # The x range to shade, with its name.
    shaded: tuple[float, float, str] | None = None
    # In units of which a letter is 11 high; the height is HEIGHT.
    width: int = WIDTH


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) from `low` to `high`, some `about` of them."""
    if not low < high:
        return [low]
    raw = (high - low) / about
    power = _DECADE ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{index * step:.12g}") for index in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten from `low` to `high`, with 2 and 5 times them where the range is short; both above 0."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors = (1, 2, 5) if last - first <= _FEW_DECADES else (1,)
    held = [float(f"{factor}e{power}") for power in range(first, last + 1) for factor in factors]
    return [tick for tick in held if low * (1 - 1e-9) <= tick <= high * (1 + 1e-9)]


@dataclass(frozen=True, slots=True)
class Axis:
    """Maps values to places along one side of a plot."""

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    def place(self, value: float) -> float:
        """The coordinate of `value`; values outside are held at the edge."""
        low, high, at = self.low, self.high, min(max(value, self.low), self.high)
        if self.log:
            low, high, at = math.log10(low), math.log10(high), math.log10(at)
        share = (at - low) / (high - low) if high > low else 0.5
        return self.start + share * (self.stop - self.start)

    def ticks(self) -> list[float]:
        """Where to label it."""
        return log_ticks(self.low, self.high) if self.log else ticks(self.low, self.high)


def figure(plot: Plot) -> str:
    """The plot as an HTML figure with heading, legend and note; says so in words where there is nothing to draw."""
    title = escaped(plot.title)
    drawn = draw(plot) if _values(plot) else '<p class="none">Nothing to show.</p>'
    note = f"<p>{escaped(plot.note)}</p>" if plot.note else ""
    return f"<figure><figcaption>{title}</figcaption>{legend(plot)}{drawn}{note}</figure>"


def legend(plot: Plot) -> str:
    """The names of the curves with a sample of each, as a list that wraps; empty for one curve without a name."""
    shown = []
    for index, curve in enumerate(plot.curves):
        if curve.name:
            sample = _bar_sample(index) if plot.bar_width else _line_sample(f"line c{index % COLOURS}")
            shown.append(f"<li>{sample}{escaped(curve.name, _LONGEST_NAME)}</li>")
    shown += [f"<li>{_line_sample('guide')}{escaped(guide.name, _LONGEST_NAME)}</li>" for guide in plot.guides]
    if plot.shaded:
        shown.append(
            '<li><svg width="22" height="10" aria-hidden="true"><rect width="22" height="10" class="shade"/></svg>'
            f"{escaped(plot.shaded[2])}</li>"
        )
    return f'<ul class="legend">{"".join(shown)}</ul>' if shown else ""


def _line_sample(classes: str) -> str:
    return f'<svg width="22" height="10" aria-hidden="true"><path d="M0 5H22" class="{classes}"/></svg>'


def _bar_sample(index: int) -> str:
    box = f'<rect x="6" width="10" height="10" class="bar b{index % COLOURS}"/>'
    return f'<svg width="22" height="10" aria-hidden="true">{box}</svg>'


def draw(plot: Plot) -> str:
    """The plot as an SVG element. Raises ValueError where no curve has a value."""
    found = _values(plot)
    if not found:
        raise ValueError(f"nothing to draw in {plot.title!r}")
    x, y = _axes(plot, found)
    parts = [*_shade(plot, x), *_grid(plot, x, y)]
    if plot.bar_width:
        parts += _bars(plot, plot.bar_width, x, y)
    else:
        for index, curve in enumerate(plot.curves):
            parts += _line(plot, curve, index % COLOURS, x, y)
    parts += [_guide(guide, x, y, plot.width) for guide in plot.guides]
    label = escaped(f"{plot.title}: {plot.y_label} against {plot.x_label}")
    return f'<svg viewBox="0 0 {plot.width} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def _values(plot: Plot) -> list[tuple[float, float]]:
    return [
        (at, value)
        for curve in plot.curves
        for at, value in curve.points
        if value is not None and math.isfinite(value) and (at > 0 or not plot.log_x)
    ]


def _axes(plot: Plot, found: Sequence[tuple[float, float]]) -> tuple[Axis, Axis]:
    # Gaps count for the x range: a run does not end where nothing was measured any more.
    places = [at for curve in plot.curves for at, _ in curve.points if at > 0 or not plot.log_x]
    half = (plot.bar_width or 0.0) / 2
    low, high = min(places) - half, max(places) + half
    if plot.log_x:
        places += [guide.at for guide in plot.guides if guide.vertical and guide.at > 0]
        low, high = min(places), max(places)
        if low == high:
            low, high = low / 2, high * 2
    else:
        low = min(0.0, low)
    top = max([plot.y_least_top, *_tops(plot, found)])
    levels = [guide.at for guide in plot.guides if not guide.vertical]
    top = max([top, *levels]) or 1.0
    # The scale ends at a tick, so that its greatest value is named.
    step = ticks(0.0, top)[1]
    top = math.ceil(top / step - 1e-9) * step
    return (
        Axis(low, high, _LEFT, plot.width - _RIGHT, log=plot.log_x),
        Axis(0.0, top, HEIGHT - _BOTTOM, _TOP),
    )


def _tops(plot: Plot, found: Sequence[tuple[float, float]]) -> list[float]:
    if not plot.bar_width:
        return [value for _, value in found]
    sums: dict[float, float] = {}
    for at, value in found:
        sums[at] = sums.get(at, 0.0) + value
    return list(sums.values())


def _shade(plot: Plot, x: Axis) -> Iterator[str]:
    if plot.shaded:
        start, stop = x.place(plot.shaded[0]), x.place(plot.shaded[1])
        size = f'width="{stop - start:.1f}" height="{HEIGHT - _TOP - _BOTTOM}"'
        yield f'<rect x="{start:.1f}" y="{_TOP}" {size} class="shade"><title>{escaped(plot.shaded[2])}</title></rect>'


def _grid(plot: Plot, x: Axis, y: Axis) -> Iterator[str]:
    bottom, right = HEIGHT - _BOTTOM, plot.width - _RIGHT
    for tick in y.ticks():
        at = y.place(tick)
        yield f'<path d="M{_LEFT} {at:.1f}H{right}" class="grid"/>'
        yield f'<text x="{_LEFT - 5}" y="{at + 4:.1f}" text-anchor="end">{short(tick)}</text>'
    for tick in x.ticks():
        at = x.place(tick)
        yield f'<path d="M{at:.1f} {bottom}V{bottom + 4}" class="axis"/>'
        yield f'<text x="{at:.1f}" y="{bottom + 15}" text-anchor="middle">{short(tick)}</text>'
    yield f'<path d="M{_LEFT} {_TOP}V{bottom}H{right}" class="axis"/>'
    yield f'<text x="{(_LEFT + right) / 2:.0f}" y="{HEIGHT - 4}" text-anchor="middle">{escaped(plot.x_label)}</text>'
    middle = (_TOP + bottom) / 2
    turned = f'transform="rotate(-90 11 {middle:.0f})" text-anchor="middle"'
    yield f'<text x="11" y="{middle:.0f}" {turned}>{escaped(plot.y_label)}</text>'


def short(value: float) -> str:
    """A tick's number, thousands and millions abbreviated."""
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * _DECADE or (abs(value) >= size and value % size == 0):
            return f"{value / size:g}{suffix}"
    return f"{value:g}"


def _line(plot: Plot, curve: Curve, colour: int, x: Axis, y: Axis) -> Iterator[str]:
    path, pen_down = [], False
    for at, value in curve.points:
        if value is None or not math.isfinite(value) or (plot.log_x and at <= 0):
            pen_down = False
            continue
        across, up = x.place(at), y.place(value)
        if pen_down and curve.steps:
            path.append(f"H{across:.1f}V{up:.1f}")
        else:
            # A lone point between gaps still shows: round line ends make it a dot.
            path.append(f"L{across:.1f} {up:.1f}" if pen_down else f"M{across:.1f} {up:.1f}h0")
        pen_down = True
    yield f'<path d="{"".join(path)}" class="line c{colour}"/>'
    known = [(at, value) for at, value in curve.points if value is not None and (at > 0 or not plot.log_x)]
    for at, value in known[:: math.ceil(len(known) / _MOST_TIPS) or 1]:
        kind = f"mark m{colour}" if curve.marked else "tip"
        yield (
            f'<circle cx="{x.place(at):.1f}" cy="{y.place(value):.1f}" r="{3 if curve.marked else 5}" class="{kind}">'
            f"<title>{_told(plot, curve.name, at, value)}</title></circle>"
        )


def _told(plot: Plot, name: str, at: float, value: float) -> str:
    lead = f"{escaped(name, _LONGEST_NAME)}\n" if name else ""
    return f"{lead}{escaped(plot.x_label)}: {number(at)}\n{escaped(plot.y_label)}: {number(value)}"


def _bars(plot: Plot, width: float, x: Axis, y: Axis) -> Iterator[str]:
    under: dict[float, float] = {}
    for index, curve in enumerate(plot.curves):
        for at, value in curve.points:
            if not value:
                continue
            base = under.get(at, 0.0)
            under[at] = base + value
            left, right = x.place(at - width / 2), x.place(at + width / 2)
            top, bottom = y.place(base + value), y.place(base)
            size = f'width="{max(right - left - 0.5, 0.5):.1f}" height="{bottom - top:.1f}"'
            yield (
                f'<rect x="{left:.1f}" y="{top:.1f}" {size} class="bar b{index % COLOURS}">'
                f"<title>{_told(plot, curve.name, at, value)}</title></rect>"
            )


def _guide(guide: Guide, x: Axis, y: Axis, width: int) -> str:
    if guide.vertical:
        path = f"M{x.place(guide.at):.1f} {_TOP}V{HEIGHT - _BOTTOM}"
    else:
        path = f"M{_LEFT} {y.place(guide.at):.1f}H{width - _RIGHT}"
    return f'<path d="{path}" class="guide"><title>{escaped(guide.name)}: {number(guide.at)}</title></path>'
