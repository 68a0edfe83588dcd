"""A report as one page that needs nothing else: no script, no other file, no network; light, dark and on paper."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from importlib import resources

from loadtest.reports import plots
from loadtest.reports.model import ReportRun, counted, figures
from loadtest.reports.rows import compared, figure_rows, heads, target_rows, unserved
from loadtest.reports.svg import figure
from loadtest.reports.text import escaped, flat, quantity
from loadtest.reports.verdict import State, judge

_CLASSES = {State.MET: "met", State.NOT_MET: "missed", State.INVALID: "invalid"}
_HEADLINES = {
    State.MET: "All targets met",
    State.NOT_MET: "Targets missed",
    State.INVALID: "Invalid run: do not use these figures",
}
_TILES = (
    ("requests", "requests", ""),
    ("completed_share", "completed", "share"),
    ("good_share", "within latency targets", "share"),
    ("ttft_p95_s", "TTFT p95", "s"),
    ("itl_p95_s", "ITL p95", "s"),
    ("e2e_p95_s", "E2E p95", "s"),
    ("output_tok_s", "output", "tok/s"),
    ("goodput_rps", "goodput", "req/s"),
)
_READING = (
    ("TTFT", "time to first token: from the moment a request was due until its first content came"),
    ("ITL", "inter-token latency: the gaps between pieces of content, of all requests together"),
    ("TPOT", "time per output token: a request's time after its first token, divided by its further tokens"),
    ("E2E", "end-to-end time: from the moment a request was due until the answer ended; completed requests only"),
    ("goodput", "requests a second that completed and met every latency target themselves"),
    (
        "due, not sent",
        "times count from the plan. A request that the client sent late waited all the same; if the client was late "
        "by more than the server's own times allow, the run is invalid",
    ),
    ("rejected", "a clear refusal: HTTP 4xx, or 503 with Retry-After. Failed: everything else that did not complete"),
    ("warm-up", "requests at the beginning that are shown over time, and left out of every figure"),
)


def page(runs: Sequence[ReportRun]) -> str:
    """The whole page of one run, or of several compared with the first. Raises ValueError for none."""
    if not runs:
        raise ValueError("a report needs a run")
    title = escaped(" against ".join(run.name for run in runs[:2]) if len(runs) > 1 else runs[0].name)
    body = _one(runs[0], level=1) if len(runs) == 1 else _several(runs)
    css = resources.files("loadtest.reports").joinpath("report.css").read_text(encoding="utf-8")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}: load test</title><style>{css}</style></head><body>{''.join(body)}{_reading()}</body></html>\n"
    )


def _one(run: ReportRun, *, level: int) -> Iterator[str]:
    verdict = judge(run)
    yield f"<h{level}>{escaped(run.name)}</h{level}>"
    yield f'<p class="soft">Load test, {run.when:%Y-%m-%d %H:%M:%S %Z}</p>'
    yield from _simulated([run])
    reasons = "".join(f"<p>{escaped(reason)}</p>" for reason in verdict.reasons)
    kind = _CLASSES[verdict.state]
    yield f'<div class="verdict {kind}"><strong>{_HEADLINES[verdict.state]}</strong>{reasons}</div>'
    found = figures(counted(run.records), run.slo)
    tiles = (f"<li><b>{quantity(found[key], unit, 3)}</b><span>{name}</span></li>" for key, name, unit in _TILES)
    yield f'<ul class="tiles">{"".join(tiles)}</ul>'
    if verdict.lines:
        yield "<h2>Targets</h2>"
        rows = ([*map(_cell, row[:-1]), _cell(row[-1], "good" if met else "bad")] for row, met in target_rows(verdict))
        yield _table(["target", "limit", "measured", ""], rows)
    yield "<h2>Figures</h2>"
    yield _table(heads(), ([_cell(text) for text in row] for row in figure_rows(run)))
    lost = unserved(run)
    if lost:
        yield "<h2>Not served</h2>"
        yield _table(
            ["kind", "requests", "the first one"],
            ([_cell(one.kind), _cell(f"{one.count:,}"), _cell(one.detail)] for one in lost),
            kind="text",
        )
    yield f'<h2>Plots</h2><div class="plots">{"".join(map(figure, plots.of_one(run)))}</div>'
    notes = run.scenario.get("notes") or ()
    if notes:
        yield f"<h2>Notes</h2>{''.join(f'<p>{escaped(str(note))}</p>' for note in notes)}"
    yield "<h2>How it was run</h2>"
    for name, held in (("Scenario", run.scenario), ("Machine of the client", run.machine)):
        lines = ([_cell(key), _cell(value)] for key, value in flat({k: v for k, v in held.items() if k != "notes"}))
        yield f"<details><summary>{name}</summary>{_table(['setting', 'value'], lines, kind='text')}</details>"


def _several(runs: Sequence[ReportRun]) -> Iterator[str]:
    yield f"<h1>{len(runs)} load tests compared</h1>"
    yield from _simulated(runs)
    rows = []
    for run in runs:
        verdict = judge(run)
        kind = {"met": "good"}.get(_CLASSES[verdict.state], "bad")
        rows.append([_cell(run.name), _cell(f"{run.when:%Y-%m-%d %H:%M %Z}"), _cell(verdict.state.value, kind)])
    yield _table(["run", "when", "verdict"], rows, kind="text")
    yield "<h2>Figures, and their ratio to the first run</h2>"
    yield '<p class="soft">Coloured where they differ by more than 5 %: less than that, two runs differ by chance.</p>'
    yield _table(
        ["", *(run.name for run in runs)],
        ([_cell(label), *(_cell(text, kind) for text, kind in row)] for label, row in compared(runs)),
    )
    shown = list(plots.cdfs(runs))
    goodput = plots.goodput_against_load(runs)
    if goodput is not None:
        shown.insert(0, goodput)
    yield f'<h2>Plots</h2><div class="plots">{"".join(map(figure, shown))}</div>'
    for run in runs:
        yield f"<details><summary>{escaped(run.name)}</summary>{''.join(_one(run, level=2))}</details>"


def _simulated(runs: Iterable[ReportRun]) -> Iterator[str]:
    if any(run.simulated for run in runs):
        yield (
            '<div class="verdict simulated"><strong>Simulated engine</strong><p>The engines computed nothing: these '
            "figures say what the way to an engine does, and nothing of any model's speed.</p></div>"
        )


def _reading() -> str:
    rows = ([_cell(name), _cell(meaning)] for name, meaning in _READING)
    return f"<details><summary>How to read this</summary>{_table(['word', 'meaning'], rows, kind='text')}</details>"


def _cell(text: str, kind: str = "") -> str:
    return f'<td class="{kind}">{escaped(text)}</td>' if kind else f"<td>{escaped(text)}</td>"


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    head = "".join(f'<th scope="col">{escaped(name)}</th>' for name in columns)
    body = "".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    return f'<div class="wide"><table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
