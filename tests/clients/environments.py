"""The clients that users bring, in environments of their own (`make clients`), run as they run them: as programs.

Where an environment is absent its tests are skipped and say so; with CI=true that is a failure.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[2]
CLIENTS = REPOSITORY / ".tools" / "clients"
PYTHON = CLIENTS / "bin" / "python"
# Node comes as a Python package.
NODE = CLIENTS / "bin" / "node"
NODE_MODULES = CLIENTS / "node_modules"
# Tools that measure: they exclude some of the clients.
EVALUATION = REPOSITORY / ".tools" / "evaluation"
PROGRAMS = Path(__file__).parent / "programs"
HOW = "`make clients` installs it from the package index and npm's registry"


def required(path: Path) -> Path:
    """The path, if it is there; else the test is skipped, or fails in CI."""
    if path.exists():
        return path
    reason = f"{path.relative_to(REPOSITORY)} is not installed: {HOW}"
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


def environment(home: Path, **variables: str) -> dict[str, str]:
    """What a client's program finds: a home of its own, nothing of ours, nothing reported to anybody."""
    home.mkdir(parents=True, exist_ok=True)
    return {
        "PATH": f"{CLIENTS / 'bin'}:{os.environ['PATH']}",
        "HOME": str(home),
        "TMPDIR": os.environ.get("TMPDIR", "/tmp"),
        "LANG": "C.UTF-8",
        "DO_NOT_TRACK": "1",
        "LLM_USER_PATH": str(home / "llm"),
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "OPENAI_AGENTS_DISABLE_TRACING": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        **variables,
    }


def run_programs(
    names: Iterable[str], home: Path, variables: Mapping[str, str], timeout_s: float
) -> dict[str, dict[str, Any]]:
    """What `CLIENT:CAPABILITY` programs of one language found, or how they failed; one process for all of them."""
    names = list(names)
    languages = {language_of(name) for name in names}
    (language,) = languages
    if language == "python":
        command = [str(required(PYTHON)), str(PROGRAMS / "runner.py")]
    else:
        # Node looks for packages beside a program.
        beside = shutil.copytree(PROGRAMS / "javascript", home / "javascript")
        (beside / "node_modules").symlink_to(required(NODE_MODULES))
        command = [str(required(NODE)), str(beside / "runner.mjs")]
    done = subprocess.run(
        [*command, *names],
        env=environment(home, **variables),
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == len(names), f"exit code {done.returncode}\n{done.stderr[-4000:]}"
    return {f"{line['client']}:{line['capability']}": line for line in found}


def language_of(name: str) -> str:
    """Whose programs a client's are: "python" or "javascript"."""
    client = name.split(":")[0]
    return "javascript" if (PROGRAMS / "javascript" / f"with_{client}.mjs").exists() else "python"
