"""A user's own requests: one JSON object a line, with or without the times at which they came."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, ValidationError

from loadtest.errors import LoadtestError
from loadtest.strict import Strict
from loadtest.workloads.draft import Count, Draft, Setting, Workload
from loadtest.workloads.text import prose_cut, prose_tokens

_Text = Annotated[str, Field(min_length=1)]


class Line(Strict):
    """One request as it stands in the file; what is absent is the stream's."""

    prompt: _Text
    output_tokens: Count
    # Seconds; the file must ascend in it.
    at_s: Annotated[float, Field(ge=0)] | None = None
    tenant: _Text | None = None
    session: _Text | None = None
    model: _Text | None = None


class JsonlWorkload(Workload):
    """One draft a line; `path` is relative to the scenario's folder. Empty lines are skipped."""

    timed: ClassVar[bool] = True

    kind: Literal["jsonl"]
    path: _Text

    def drafts(self, setting: Setting) -> Iterator[Draft]:
        """The file from its first line on; raises LoadtestError with file, line and field."""
        path = setting.base / self.path
        try:
            file = path.open("rb")
        except OSError as error:
            raise LoadtestError(f"{path}: cannot be read: {error.strerror}; 'path' names it") from error
        latest_s = 0.0
        with file:
            for number, text in enumerate(file, 1):
                if not text.strip():
                    continue
                line = _parsed(text, path, number)
                _check(line, f"{path}:{number}", setting, latest_s)
                latest_s = line.at_s or latest_s
                yield Draft(
                    at_s=line.at_s,
                    prompt_tokens=prose_tokens(line.prompt),
                    output_tokens=line.output_tokens,
                    write=partial(prose_cut, line.prompt),
                    tenant=line.tenant,
                    model=line.model,
                    session=line.session,
                )


def _parsed(text: bytes, path: Path, number: int) -> Line:
    try:
        return Line.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"] or [first.get("ctx", {}).get("field", "")])
        raise LoadtestError(f"{path}:{number}: {f'{field}: ' if field else ''}{first['msg']}") from None


def _check(line: Line, where: str, setting: Setting, latest_s: float) -> None:
    if line.at_s is None:
        if setting.needs_times:
            raise LoadtestError(f"{where}: at_s: missing; every line needs one with 'arrivals: {{kind: trace}}'")
    elif line.at_s < latest_s:
        raise LoadtestError(f"{where}: at_s: {line.at_s} is earlier than {latest_s} before it; sort the file")
    if line.tenant is not None and setting.tenants is not None and line.tenant not in setting.tenants:
        allowed = ", ".join(sorted(setting.tenants))
        raise LoadtestError(f"{where}: tenant: {line.tenant!r} has no key in the scenario; allowed: {allowed}")
