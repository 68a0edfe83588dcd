"""A replay of a few seconds whose figures are stored: a change of policy, signals or simulator that moves them shows here.

The stored values are simulated. Where a change is meant to move them, run the test, read what it says, and store anew.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from loadtest.profiles.model import load_profile
from loadtest.workloads.draft import data_folder
from serving.cli import app
from serving.simulation.catalogue import find
from serving.simulation.comparison import bench, scaler
from serving.simulation.engine import Engine, Targets
from serving.simulation.oracle import Search, fewest
from serving.simulation.replay import Outcome, replay
from serving.simulation.traces import Trace

# How far a figure may move: the event loop is deterministic, the arithmetic of other processors is not to the last bit.
ATTAINMENT_WITHIN = 0.003
HOURS_WITHIN = 0.02
TARGETS = Targets(5.0, 0.1)


def engine() -> Engine:
    return Engine.of(load_profile("a100-llama-3.1-8b-published"))


def made(seconds: int = 2400, seed: int = 11) -> Trace:
    """A load that swells and ebbs around 45 requests a second, lengths like a chat service's."""
    rng = np.random.default_rng(seed)
    second = np.arange(seconds)
    rate = 45 + 25 * np.sin(2 * math.pi * second / 1800) + 8 * np.sin(2 * math.pi * second / 310)
    number = rng.poisson(rate)
    at_s = np.sort(np.repeat(second, number) + rng.random(number.sum()))
    n = len(at_s)
    prompts = np.clip(rng.lognormal(6.6, 0.9, n), 8, 12000).astype(np.int32)
    outputs = np.clip(rng.lognormal(5.0, 0.8, n), 2, 2000).astype(np.int32)
    return Trace("made", at_s, prompts, outputs, float(seconds))


def played(policy: str, trace: Trace, delay_s: float = 45.0) -> Outcome:
    here = bench(trace, engine(), TARGETS, delay_s=delay_s)
    return replay(here, scaler(policy, here))


def held(outcome: Outcome, attainment: float, gpu_hours: float) -> None:
    seen = f"attainment {outcome.attainment:.4f}, {outcome.gpu_hours:.2f} GPU-hours"
    assert outcome.attainment == pytest.approx(attainment, abs=ATTAINMENT_WITHIN), seen
    assert outcome.gpu_hours == pytest.approx(gpu_hours, rel=HOURS_WITHIN), seen


@pytest.mark.parametrize(
    ("delay_s", "attainment", "gpu_hours"), [(5.0, 0.9992, 7.90), (45.0, 0.9944, 8.40), (120.0, 0.9381, 9.09)]
)
def test_ours_on_a_made_trace(delay_s: float, attainment: float, gpu_hours: float) -> None:
    held(played("ours", made(), delay_s), attainment, gpu_hours)


@pytest.mark.parametrize(
    ("policy", "attainment", "gpu_hours"),
    [("ray-default", 1.0, 46.93), ("hpa-waiting", 0.8729, 49.10), ("keda-default", 0.8582, 49.63)],
)
def test_the_peers_on_a_made_trace(policy: str, attainment: float, gpu_hours: float) -> None:
    held(played(policy, made()), attainment, gpu_hours)


def test_ours_on_azures_first_half_hour() -> None:
    if not (data_folder() / "azure2023_conv.csv").is_file():
        pytest.skip(f"{data_folder()} holds no traces")
    held(played("ours", find("azure2023_conv", scale=10.0, until_s=1750.0)), 0.9967, 7.80)


def test_the_oracle_costs_less_than_the_fewest_constant_replicas_and_reaches_the_goal() -> None:
    trace = made(1200)
    here = bench(trace, engine(), TARGETS, delay_s=45.0)
    fixed, found = fewest(here), Search(here).cheapest()
    assert fixed is not None
    assert found is not None
    assert found[1].attainment >= 0.99
    assert fixed[1].attainment >= 0.99
    assert found[1].gpu_hours < fixed[1].gpu_hours


def azure_file(folder: Path) -> Path:
    rows = ["TIMESTAMP,ContextTokens,GeneratedTokens"]
    rows += [f"2023-11-16 18:{i // 60:02d}:{i % 60:02d}.5000000,{100 + i},{20 + i % 50}" for i in range(600)]
    path = folder / "small.csv"
    path.write_text("\n".join(rows))
    return path


def test_json_is_one_object_that_says_it_is_simulated(tmp_path: Path) -> None:
    options = ["--trace", str(azure_file(tmp_path)), "--policy", "ours", "--policy", "static", "--start-delay", "5"]
    result = CliRunner().invoke(app, ["simulate", "autoscale", *options, "--json", "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["simulated"] is True
    assert [row["policy"] for row in document["rows"]] == ["ours", "static"]
    for row in document["rows"]:
        assert 0 <= row["slo_attainment"] <= 1
        assert row["gpu_hours"] > 0
    page = (tmp_path / "out" / "autoscale.html").read_text()
    assert "SIMULATED" in page
    assert "<svg" in page
    assert "<script" not in page


@pytest.mark.parametrize(
    "options",
    [
        ["--trace", "nowhere"],
        ["--trace", "FILE", "--policy", "magic"],
        ["--trace", "FILE", "--rate-scale", "0"],
        ["--trace", "FILE", "--from-s", "10", "--until-s", "5"],
        ["--trace", "FILE", "--profile", "nowhere"],
    ],
)
def test_what_cannot_be_simulated_is_one_sentence(tmp_path: Path, options: list[str]) -> None:
    path = str(azure_file(tmp_path))
    result = CliRunner().invoke(app, ["simulate", "autoscale", *[path if o == "FILE" else o for o in options]])
    assert result.exit_code == 1
    assert type(result.exception).__name__ == "SimulationError"
