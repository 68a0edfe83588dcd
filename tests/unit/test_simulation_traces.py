"""Traces are told by what they hold, thinned and scaled as stated, and a bad file is one readable error."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path

import numpy as np
import pytest

from loadtest.errors import LoadtestError
from loadtest.workloads.servegen import LENGTHS_FILE, RATES_FILE
from serving.simulation.catalogue import find
from serving.simulation.traces import part, scaled

AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:00:00.5000000,100,10\n2023-11-16 18:00:02.0000000,200,20\n"
)


def servegen(folder: Path, *, rate: float = 2.0, cv: float = 1.0, windows: int = 6, clients: int = 3) -> Path:
    rates = ["pool,client,t_s,rate_rps,cv,dist,p1,p2"]
    lengths = ["pool,client,field,windows,mean,p1,p5,p10,p25,p50,p75,p90,p95,p99"]
    for client in range(clients):
        rates += [f"p,{client},{600 * i},{rate},{cv},Gamma,1,1" for i in range(windows)]
        if client:
            lengths += [
                f"p,{client},{field},{windows},9,10,20,30,40,50,60,70,80,90"
                for field in ("input_tokens", "output_tokens")
            ]
    with gzip.open(folder / RATES_FILE, "wt") as file:
        file.write("\n".join(rates) + "\n")
    with gzip.open(folder / LENGTHS_FILE, "wt") as file:
        file.write("\n".join(lengths) + "\n")
    return folder / RATES_FILE


def test_azures_rows_are_read(tmp_path: Path) -> None:
    (tmp_path / "any.name").write_text(AZURE)
    trace = find(str(tmp_path / "any.name"))
    assert trace.at_s.tolist() == [0.0, 1.5]
    assert trace.prompt_tokens.tolist() == [100, 200]
    assert trace.output_tokens.tolist() == [10, 20]


def test_the_later_azure_form_is_read_too(tmp_path: Path) -> None:
    text = AZURE.replace(".5000000,", ".500000+00:00,").replace("02.0000000,", "02+00:00,")
    path = tmp_path / "a.csv.gz"
    path.write_bytes(gzip.compress(text.encode()))
    assert find(str(path)).at_s.tolist() == [0.0, 1.5]


def test_mooncakes_lines_are_read(tmp_path: Path) -> None:
    lines = [{"timestamp": t, "input_length": 5, "output_length": 0, "hash_ids": [1]} for t in (27000, 0, 3000)]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, lines)))
    trace = find(str(tmp_path / "m.jsonl"))
    assert trace.at_s.tolist() == [0.0, 3.0, 27.0]
    assert trace.output_tokens.tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "not a trace that is known"),
        ("a,b\n1,2\n", "not a trace that is known"),
        (AZURE + "never,1,2\n", "any.csv:4: not a row of this trace"),
        (AZURE + "2023-11-16 18:00:03,x,2\n", "any.csv:4: not a row of this trace"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "holds no request"),
        ('{"timestamp": 0}\n', "any.csv:1: not a line of this trace"),
        ('{"timestamp": "nan", "input_length": 1, "output_length": 1}\n', "any.csv:1: not a line of this trace"),
        ("{\n", "any.csv:1: not a line of this trace"),
    ],
)
def test_a_bad_file_is_one_error(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "any.csv").write_text(text)
    with pytest.raises(LoadtestError) as caught:
        find(str(tmp_path / "any.csv"))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bytes_that_are_no_text_are_one_error(tmp_path: Path) -> None:
    (tmp_path / "b").write_bytes(b"\x1f\x8bnot gzip at all")
    with pytest.raises(LoadtestError, match="cannot be read"):
        find(str(tmp_path / "b"))


def test_a_pool_is_found_beside_its_lengths(tmp_path: Path) -> None:
    trace = find(f"{servegen(tmp_path)}:p")
    # Three clients, six windows of ten minutes, two a second.
    assert len(trace) == pytest.approx(3 * 3600 * 2, rel=0.05)
    assert trace.duration_s == 3600
    assert 10 <= trace.prompt_tokens.min() <= trace.prompt_tokens.max() <= 90
    assert np.median(trace.prompt_tokens) == pytest.approx(50, abs=2)
    assert "1 of 3 clients have no lengths" in " ".join(trace.notes)
    assert (np.diff(trace.at_s) >= 0).all()


def test_a_pool_that_is_not_there_names_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(LoadtestError, match="no pool 'q'; allowed: p"):
        find(f"{servegen(tmp_path)}:q")
    with pytest.raises(LoadtestError, match="give one as"):
        find(str(tmp_path / RATES_FILE))


def test_thinning_is_told_and_keeps_bursts_as_far_as_fewer_requests_can(tmp_path: Path) -> None:
    whole = find(f"{servegen(tmp_path, cv=4.0)}:p")
    thin = find(f"{tmp_path / RATES_FILE}:p", most=len(whole) // 10)
    assert len(thin) == pytest.approx(len(whole) / 10, rel=0.15)
    assert "THINNED evenly to 10" in " ".join(thin.notes)

    def dispersion(at_s: np.ndarray) -> float:
        counts = np.histogram(at_s, bins=np.arange(0, 3601, 60))[0]
        return float(counts.var() / counts.mean())

    # A kept share p of counts with dispersion D has 1 + p (D - 1): burstier than chance still.
    assert 1.2 < dispersion(thin.at_s) < dispersion(whole.at_s)


def test_scaling_keeps_the_loads_shape(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = sorted([*rng.uniform(0, 100, 200), *rng.uniform(100, 200, 800)])
    lines = [json.dumps({"timestamp": 1000 * t, "input_length": 10, "output_length": 10}) for t in rows]
    (tmp_path / "m.jsonl").write_text("\n".join(lines))
    trace = find(str(tmp_path / "m.jsonl"))
    ten = scaled(trace, 10)
    assert len(ten) == 10 * len(trace)
    assert ten.at_s.min() >= 0
    assert ten.at_s.max() < ten.duration_s
    ours, theirs = (np.histogram(t.at_s, bins=[0, 100, 200])[0] for t in (trace, ten))
    assert theirs[0] / ours[0] == pytest.approx(10, rel=0.15)
    assert len(scaled(trace, 0.5)) == pytest.approx(len(trace) / 2, rel=0.1)


def test_a_part_begins_at_nought(tmp_path: Path) -> None:
    trace = part(find(f"{servegen(tmp_path)}:p"), 600.0, 1200.0)
    assert trace.duration_s == 600
    assert trace.at_s.min() >= 0
    assert trace.at_s.max() < 600
    with pytest.raises(LoadtestError, match="no part"):
        part(trace, 700.0, math.inf)
