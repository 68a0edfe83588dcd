"""ServeGen's clients: rates, bursts and lengths are the table's, and each client keeps to itself."""

from __future__ import annotations

import gzip
import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from loadtest.errors import LoadtestError
from loadtest.workloads import Draft, Setting
from loadtest.workloads.servegen import LENGTHS_FILE, RATES_FILE, ServegenWorkload

LENGTHS_HEAD = "pool,client,field,windows,mean,p1,p5,p10,p25,p50,p75,p90,p95,p99"
RATES_HEAD = "pool,client,t_s,rate_rps,cv,dist,p1,p2"
# Straight from 100 to 199 tokens over p1 to p99 would be one more a percent; outputs are always 7.
INPUT = "100,104,109,124,149,174,189,194,198"
STEADY = {1: [(0, 4.0, 1.0), (600, 1.0, 1.0)], 2: [(0, 2.0, 0.2)], 3: [(600, 8.0, 1.0)]}


def _write(
    folder: Path, rates: Mapping[int, Sequence[tuple[float, float, float]]], without: Sequence[int] = (9,)
) -> Setting:
    lengths = [LENGTHS_HEAD]
    windows = [RATES_HEAD]
    for client, rows in rates.items():
        if client not in without:
            lengths.append(f"p,{client},input_tokens,5,150,{INPUT}")
            lengths.append(f"p,{client},output_tokens,5,7{',7' * 9}")
        windows += [f"p,{client},{t_s},{rate},{cv},Gamma,1,1" for t_s, rate, cv in rows]
    windows.append("q,1,0,5,1,Gamma,1,1")
    for name, rows_ in ((LENGTHS_FILE, lengths), (RATES_FILE, windows)):
        with gzip.open(folder / name, "wt") as file:
            file.write("\n".join(rows_) + "\n")
    return Setting(seed="s", data=folder, until_s=1200.0)


def _drafts(setting: Setting, **fields: Any) -> list[Draft]:
    return list(ServegenWorkload(kind="servegen", pool="p", tenant_per_client=True, **fields).drafts(setting))


def _times(drafts: Sequence[Draft], client: int) -> list[float]:
    return [draft.at_s for draft in drafts if draft.client == str(client) and draft.at_s is not None]


def test_clients_have_their_rates_window_by_window(tmp_path: Path) -> None:
    drafts = _drafts(_write(tmp_path, STEADY))
    times = [draft.at_s for draft in drafts]
    assert times == sorted(times, key=lambda at_s: at_s or 0.0)
    for client, window, expected in ((1, 0, 2400), (1, 1, 600), (2, 0, 1200), (2, 1, 0), (3, 0, 0), (3, 1, 4800)):
        count = sum(window * 600 <= at_s < window * 600 + 600 for at_s in _times(drafts, client))
        assert count == pytest.approx(expected, abs=4 * expected**0.5)


def test_clients_have_their_burstiness(tmp_path: Path) -> None:
    rates = {client: [(0, 10.0, cv)] for client, cv in ((1, 0.2), (2, 1.0), (3, 3.0))}
    drafts = _drafts(_write(tmp_path, rates))
    for client, cv in ((1, 0.2), (2, 1.0), (3, 3.0)):
        gaps = [after - before for before, after in pairwise(_times(drafts, client))]
        assert statistics.pstdev(gaps) / statistics.fmean(gaps) == pytest.approx(cv, rel=0.12)


def test_a_client_scaled_down_still_sends_what_is_its_share(tmp_path: Path) -> None:
    # Recorded CVs go up to 1000; kept as they are, one client in many would send everything.
    rates = {client: [(0, 10.0, 50.0)] for client in range(1, 101)}
    drafts = _drafts(_write(tmp_path, rates, without=()), top=100, rate_scale=0.001)
    assert len(drafts) == pytest.approx(600, rel=0.3)
    assert len({draft.client for draft in drafts}) > 80


def test_lengths_follow_the_quantiles(tmp_path: Path) -> None:
    drafts = _drafts(_write(tmp_path, STEADY))
    prompts = sorted(draft.prompt_tokens for draft in drafts)
    assert (prompts[0], prompts[-1]) == (100, 198)
    for share, tokens in ((0.25, 124), (0.5, 149), (0.9, 189)):
        assert prompts[int(share * len(prompts))] == pytest.approx(tokens, abs=3)
    assert {draft.output_tokens for draft in drafts} == {7}
    assert len(drafts[0].write(50).split()) == 50


def test_one_client_draws_the_same_beside_any_others(tmp_path: Path) -> None:
    setting = _write(tmp_path, STEADY)
    everybody, alone = _drafts(setting), _drafts(setting, clients=[2])
    assert _times(everybody, 2) == _times(alone, 2)
    assert {draft.client for draft in alone} == {"2"}


def test_the_busiest_clients_of_the_asked_part_are_taken(tmp_path: Path) -> None:
    setting = _write(tmp_path, {**STEADY, 9: [(0, 99.0, 1.0)]})
    # Client 9 is the busiest, but its lengths are not known; 3 is the busiest in all, 1 in the first window.
    assert {draft.client for draft in _drafts(setting, top=1)} == {"3"}
    first = Setting(seed="s", data=tmp_path, until_s=600.0)
    assert {draft.client for draft in _drafts(first, top=1)} == {"1"}


def test_without_tenants_of_their_own_clients_are_the_streams(tmp_path: Path) -> None:
    workload = ServegenWorkload(kind="servegen", pool="p")
    assert {draft.client for draft in workload.drafts(_write(tmp_path, STEADY))} == {None}


def test_what_the_tables_do_not_hold_is_named(tmp_path: Path) -> None:
    setting = _write(tmp_path, STEADY)
    with pytest.raises(LoadtestError, match=r"clients \[7\] have no lengths in pool p; allowed: \[1, 2, 3\]"):
        _drafts(setting, clients=[2, 7])
    for pool in ("q", "r"):
        with pytest.raises(LoadtestError, match=f"no pool '{pool}' in {LENGTHS_FILE}; allowed: p"):
            list(ServegenWorkload(kind="servegen", pool=pool).drafts(setting))
    (tmp_path / RATES_FILE).write_bytes(b"not gzip")
    with pytest.raises(LoadtestError, match="cannot be read as gzip"):
        _drafts(setting)
    with gzip.open(tmp_path / RATES_FILE, "wt") as file:
        file.write(f"{RATES_HEAD}\np,1,0,fast,1,Gamma,1,1\n")
    with pytest.raises(LoadtestError, match=r"not the tables of servegen: .*'fast'"):
        _drafts(setting)
