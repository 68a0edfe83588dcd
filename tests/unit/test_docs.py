"""What the documents say of the code is held against it: routes, refused fields, limits, commands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from loadtest.__main__ import app as loadtest
from serving.admission import bounds
from serving.api import routes
from serving.cli import app as galerne
from serving.config import LimitsConfig

ROOT = Path(__file__).parents[2]
API = (ROOT / "docs" / "api.md").read_text()
DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
PROGRAMS = {"galerne": galerne, "python -m loadtest": loadtest}
FENCE = re.compile(r"^```(?:sh|bash|shell)?\n(.*?)^```", re.M | re.S)
INDENTED = re.compile(r"^ {4}(\S.*)$", re.M)
INLINE = re.compile(r"`((?:\.venv/bin/)?(?:galerne|python -m loadtest) [a-z][^`|]*)`")
VARIABLE = re.compile(r"^[A-Z_]+=\S*\s+")


def section(title: str) -> str:
    """Text under a heading of docs/api.md."""
    return API.split(f"## {title}\n")[1].split("\n## ")[0]


def rows(title: str) -> list[list[str]]:
    lines = [line for line in section(title).splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_every_route_is_told_and_no_other() -> None:
    told = {row[0].strip("`") for row in rows("Routes")}
    models = f"{routes.MODEL_PREFIX}{{id}}"
    assert told == {f"POST {path}" for path in routes.RELAYED} | {f"GET {path}" for path in (*routes.OWN, models)}


def test_every_refused_field_is_told() -> None:
    told = {name for row in rows("Fields that are refused") for name in re.findall(r"`([a-z_]+)`", row[0])}
    assert told == {*bounds.REFUSED, *bounds._RESPONSES_REFUSED, "background", "store", "priority", "use_beam_search"}


def test_every_limit_is_told_with_its_default() -> None:
    told = {row[0].strip("`"): None if row[1] == "none" else int(row[1]) for row in rows("Limits")}
    assert told == LimitsConfig().model_dump()


def commands(document: Path) -> list[str]:
    text = document.read_text().replace("\\\n", " ")
    blocks = FENCE.findall(text)
    lines = [line for block in blocks for line in block.splitlines()] + INDENTED.findall(FENCE.sub("", text))
    lines += INLINE.findall(text)
    found = []
    for raw in lines:
        line = raw.strip().removeprefix("$ ")
        while variable := VARIABLE.match(line):
            line = line[variable.end() :]
        line = line.removeprefix(".venv/bin/").split(" #")[0]
        found += [line for program in PROGRAMS if line.startswith(f"{program} ")]
    return found


ALL = [(document.name, line) for document in DOCUMENTS for line in commands(document)]


@pytest.mark.parametrize(("document", "line"), ALL)
def test_commands_and_their_options_exist(document: str, line: str) -> None:
    program = next(program for program in PROGRAMS if line.startswith(f"{program} "))
    command: Any = typer.main.get_command(PROGRAMS[program])
    words = shlex.split(line.removeprefix(program))
    while words and hasattr(command, "commands") and words[0] != "…":
        if words[0].startswith("--") and command.invoke_without_command:
            break
        name = words.pop(0)
        assert name in command.commands, f"{document}: {line!r}: no command {name!r}"
        command = command.commands[name]
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    unknown = {word.split("=")[0] for word in words if word.startswith("--")} - known - {"--help"}
    assert not unknown, f"{document}: {line!r}"


def test_there_are_commands_to_check() -> None:
    assert len(ALL) > 20


@pytest.mark.parametrize("document", [*DOCUMENTS, ROOT / "helm" / "galerne" / "README.md"], ids=lambda path: path.name)
def test_nobody_is_told_to_install_a_name_that_is_not_ours(document: Path) -> None:
    # Whoever registers it would run code on the machine of whoever reads this.
    for line in document.read_text().splitlines():
        if "pip install" in line and "galerne" in line:
            assert re.search(r"galerne(\[\w+\])? @ file://|-e \.", line), line
