"""The comparison of a run with its simulation: made runs whose right answer is known."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from loadtest import run_file
from loadtest.records import Outcome, Record
from loadtest.reports.model import ReportRun
from serving.config import FakeEngineConfig, ModelConfig
from serving.errors import SimulationError
from serving.simulation.engine import Targets
from serving.simulation.validate import Compared, engine_of, validate

STEP_S = 0.02
PROMPT, ANSWER = 400, 51
# Alone on an engine of 4,000 prompt tokens a second and 20 ms a step: one pass for the prompt, then a token a step.
PREFILL_S = PROMPT / 4000 + STEP_S


def model(model_id: str = "chat") -> ModelConfig:
    fake = {"prefill_tokens_per_s": 4000, "decode_ms": 1000 * STEP_S, "decode_ms_per_sequence": 0.0, "batch_slots": 4}
    return ModelConfig.model_validate({"id": model_id, "source": "fake:chat", "replicas": {"min": 1}, "fake": fake})


def record(index: int, at_s: float, *, later_s: float = 0.0, **more: object) -> Record:
    """As an idle engine answers, its first token later by so much."""
    first_s = at_s + PREFILL_S + later_s
    values: dict[str, object] = {
        "index": index,
        "tenant": "t",
        "model": "chat",
        "scheduled_s": at_s,
        "sent_s": at_s,
        "chunks_s": tuple(first_s + i * STEP_S for i in range(ANSWER)),
        "end_s": first_s + ANSWER * STEP_S,
        "status": 200,
        "outcome": Outcome.COMPLETED,
        "prompt_tokens": PROMPT,
        "completion_tokens": ANSWER,
    }
    return Record(**(values | more))  # type: ignore[arg-type]


def saved(folder: Path, records: list[Record]) -> Path:
    path = folder / "run.json.gz"
    run = ReportRun(
        name="made",
        when=datetime(2026, 1, 1, tzinfo=UTC),
        machine={},
        scenario={},
        records=records,
        simulated=True,
        slo=(),
        replicas=(),
        invalid=(),
    )
    run_file.save(run, path)
    return path


def compared(folder: Path, records: list[Record], targets: Targets | None = None) -> dict[str, Compared]:
    rows = validate(saved(folder, records), model(), targets or Targets(1.0, 0.05))
    return {row.name: row for row in rows}


def test_a_run_that_went_as_simulated_has_no_error(tmp_path: Path) -> None:
    rows = compared(tmp_path, [record(i, 5.0 * i) for i in range(20)])
    for name, row in rows.items():
        assert row.error == pytest.approx(0.0, abs=0.01), name
    assert rows["TTFT p50, s"].measured == pytest.approx(PREFILL_S, abs=1e-5)
    assert rows["mean ITL mean, s"].simulated == pytest.approx(STEP_S, rel=0.01)


def test_what_a_cluster_adds_is_the_error(tmp_path: Path) -> None:
    rows = compared(tmp_path, [record(i, 5.0 * i, later_s=PREFILL_S) for i in range(20)])
    # Measured twice what is simulated.
    assert rows["TTFT mean, s"].error == pytest.approx(-0.5, abs=0.01)
    assert rows["mean ITL p50, s"].error == pytest.approx(0.0, abs=0.01)


def test_attainment_is_compared_in_points(tmp_path: Path) -> None:
    late = [record(i, 5.0 * i, later_s=3.0 if i % 4 == 0 else 0.0) for i in range(20)]
    row = compared(tmp_path, late)["attainment"]
    assert (row.measured, row.simulated) == (0.75, 1.0)
    assert row.error == pytest.approx(0.25)


def test_only_complete_requests_of_the_model_after_the_warm_up_count(tmp_path: Path) -> None:
    fine = [record(i, 5.0 * i) for i in range(4)]
    other = [
        record(4, 20.0, later_s=9.0, warm_up=True),
        record(5, 40.0, later_s=9.0, outcome=Outcome.FAILED),
        record(6, 60.0, later_s=9.0, model="another"),
        record(7, 80.0, chunks_s=(), outcome=Outcome.REJECTED),
    ]
    assert compared(tmp_path, [*other, *fine])["attainment"].measured == 1.0


@pytest.mark.parametrize("records", [[], [record(0, 0.0, model="another")], [record(0, 0.0, completion_tokens=None)]])
def test_a_run_without_a_request_to_compare_is_an_error(tmp_path: Path, records: list[Record]) -> None:
    with pytest.raises(SimulationError, match="no completed request"):
        validate(saved(tmp_path, records), model(), Targets(1.0, 0.05))


def test_a_file_that_is_no_run_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "run.json.gz"
    path.write_text("{}")
    with pytest.raises(SimulationError, match="not the file of a run"):
        validate(path, model(), Targets())


def test_the_engine_has_the_fake_engines_speeds() -> None:
    fake = FakeEngineConfig.model_validate({"prefill_tokens_per_s": 5000, "decode_ms": 30.0, "batch_slots": 7})
    engine = engine_of(fake)
    assert (engine.rate, engine.step_s, engine.max_sequences) == (5000.0, 0.03, 7)
    assert engine.kv_tokens == fake.kv_blocks * fake.block_tokens
    assert engine.chunk_tokens == fake.prefill_chunk_tokens
