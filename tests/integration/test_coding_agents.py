"""Coding agents finish a task of one line by themselves: they call a tool of their own, read its result, and answer.

The engine is simulated: it calls the tool that it is asked to call, and its answers are words without a meaning.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.clients import environments
from tests.integration.running import KEY, RunningCluster

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

MODEL = "chat"
TASK_TIMEOUT_S = 300
BIN = environments.NODE_MODULES / ".bin"
KEY_VARIABLE = "GALERNE_KEY"


@dataclass(frozen=True)
class Agent:
    """How an agent is told where the models are, and given a task."""

    command: tuple[str, ...]
    # Its configuration, by path below its home.
    files: Callable[[str], dict[str, str]]
    # A tool of its own that changes nothing, and how its output shows that it called it, and that it answered then.
    tool: str
    calls: str
    answers: str
    variables: dict[str, str]


CODEX = """
model = "{model}"
model_provider = "galerne"
check_for_update_on_startup = false
[analytics]
enabled = false
[model_providers.galerne]
name = "Galerne"
base_url = "{url}/v1"
env_key = "{key}"
wire_api = "responses"
request_max_retries = 0
stream_max_retries = 0
"""


def opencode(url: str) -> dict[str, str]:
    provider = {
        "npm": "@ai-sdk/openai-compatible",
        "name": "Galerne",
        "options": {"baseURL": f"{url}/v1", "apiKey": KEY},
        "models": {MODEL: {"name": MODEL}},
    }
    settings = {"provider": {"galerne": provider}, "autoupdate": False, "share": "disabled"}
    return {".config/opencode/opencode.json": json.dumps(settings)}


def qwen(url: str) -> dict[str, str]:
    settings = {"telemetry": {"enabled": False}, "privacy": {"usageStatisticsEnabled": False}}
    return {".qwen/settings.json": json.dumps(settings)}


AGENTS = {
    # Codex asks for a sandbox of the kernel's where its command may be dangerous; the simulated engine's is the word "text".
    "codex": Agent(
        (str(BIN / "codex"), "exec", "--json", "--skip-git-repo-check", "--sandbox", "danger-full-access"),
        lambda url: {".codex/config.toml": CODEX.format(model=MODEL, url=url, key=KEY_VARIABLE)},
        tool="exec_command",
        calls='"type":"command_execution"',
        answers='"type":"agent_message"',
        variables={},
    ),
    "opencode": Agent(
        (
            str(environments.NODE_MODULES / "opencode-linux-x64" / "bin" / "opencode"),
            *("run", "--format", "json", "--model", f"galerne/{MODEL}"),
        ),
        opencode,
        tool="glob",
        calls='"tool":"glob"',
        answers='"type":"text"',
        variables={"OPENCODE_DISABLE_MODELS_FETCH": "1", "OPENCODE_DISABLE_AUTOUPDATE": "1"},
    ),
    "qwen-code": Agent(
        (str(BIN / "qwen"), "--auth-type", "openai", "--model", MODEL, "--output-format", "stream-json"),
        qwen,
        tool="glob",
        calls='"name":"glob"',
        answers='"subtype":"success"',
        variables={},
    ),
}


def finished(agent: Agent, url: str, directory: Path) -> subprocess.CompletedProcess[str]:
    """The agent's run, in a directory and with a home of its own."""
    home, work = directory / "home", directory / "work"
    work.mkdir()
    (work / "README.md").write_text("Nothing to do here.\n")
    for name, text in agent.files(url).items():
        path = home / name
        path.parent.mkdir(parents=True)
        path.write_text(text)
    variables = {KEY_VARIABLE: KEY, "OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": f"{url}/v1", **agent.variables}
    return subprocess.run(
        [*agent.command, f"Call {agent.tool} once, then say that you are done."],
        cwd=work,
        env=environments.environment(home, **variables),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TASK_TIMEOUT_S,
        check=False,
    )


@pytest.fixture(scope="module")
def runs(
    fake_cluster: RunningCluster, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[subprocess.CompletedProcess[str]]]]:
    """All of them at once: most of their time is their own start."""
    environments.required(environments.NODE_MODULES)
    with ThreadPoolExecutor(len(AGENTS)) as pool:
        yield {
            name: pool.submit(finished, agent, fake_cluster.url, tmp_path_factory.mktemp(name))
            for name, agent in AGENTS.items()
        }


@pytest.mark.parametrize("name", AGENTS)
def test_a_coding_agent_finishes_a_task(name: str, runs: dict[str, Future[subprocess.CompletedProcess[str]]]) -> None:
    run = runs[name].result()
    assert run.returncode == 0, (run.stdout[-3000:], run.stderr[-3000:])
    before, called, after = run.stdout.partition(AGENTS[name].calls)
    assert called, (before[-3000:], run.stderr[-3000:])
    assert AGENTS[name].answers in after, (after[-3000:], run.stderr[-3000:])
