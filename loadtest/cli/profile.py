"""`loadtest profile`: how fast an engine is."""

from __future__ import annotations

import secrets
import time
from contextlib import ExitStack
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
import uvloop
from rich.console import Console

from loadtest import server
from loadtest.command import numbers
from loadtest.errors import LoadtestError
from loadtest.processes import this_machine
from loadtest.profiles.fit import fit
from loadtest.profiles.measure import ProfileSettings, measure
from loadtest.profiles.model import EngineProfile
from loadtest.report import table
from loadtest.request import target_at
from loadtest.targets import real_cluster


def profile(
    url: Annotated[
        str | None, typer.Option(help="http://HOST:PORT of an engine or gateway; default: start one")
    ] = None,
    model: Annotated[str | None, typer.Option(help="with --url: the model's id")] = None,
    key: Annotated[str | None, typer.Option(envvar="GALERNE_KEY", help="with --url: an API key")] = None,
    name: Annotated[str, typer.Option(help="of the profile")] = "engine",
    prompt_tokens: Annotated[str, typer.Option(help="lengths of prompts, with commas")] = "64,128,256,512,1024,1536",
    batches: Annotated[str, typer.Option(help="answers at once, with commas")] = "1,2,4,8,16",
    contexts: Annotated[str, typer.Option(help="prompts of these, with commas")] = "64,512",
    repeats: Annotated[int, typer.Option(min=1, help="of each prompt")] = 3,
    output_tokens: Annotated[int, typer.Option(min=8)] = 24,
    remark: Annotated[list[str] | None, typer.Option(help="what a reader must know; may be repeated")] = None,
    out: Annotated[Path, typer.Option()] = Path("build/bench/profile.json"),
) -> None:
    """Measure prefill and decode speed of an engine that nobody else uses, and write its profile."""
    console = Console()
    try:
        settings = ProfileSettings(numbers(prompt_tokens), numbers(batches), numbers(contexts), repeats, output_tokens)
    except ValueError as problem:
        raise LoadtestError(f"lengths and batches are numbers with commas: {problem}") from problem
    when, start_s = datetime.now(UTC), None
    with ExitStack() as held:
        if url is None:
            began_s = time.monotonic()
            subject = held.enter_context(real_cluster())
            start_s = round(time.monotonic() - began_s, 1)
            target, model, engine = subject.direct, subject.model, dict(subject.engine)
        elif model is None:
            raise LoadtestError("--model is missing: which of the server's models is to be measured")
        else:
            target, engine = target_at("engine", url, key=key), {"url": url}
        found = server.models(target)
        if model not in found:
            raise LoadtestError(f"the server has no model {model!r}; it has: {', '.join(sorted(found))}")
        with console.status("") as status:
            prefill, decode = uvloop.run(
                measure(target, model, settings, salt=secrets.token_hex(4), progress=status.update)
            )
    try:
        fitted = fit(prefill, decode)
    except ValueError as problem:
        raise LoadtestError(str(problem)) from problem
    document = EngineProfile(
        name=name,
        model=model,
        when=when.isoformat(timespec="seconds"),
        simulated=found[model].simulated,
        machine=asdict(this_machine()),
        engine=engine,
        start_s=start_s,
        prefill=tuple(prefill),
        decode=tuple(decode),
        fit=fitted,
        remarks=tuple(remark or ()),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(document.model_dump_json(indent=1) + "\n", encoding="utf-8")
    console.print(
        table(
            f"{name}: prefill",
            ["prompt tokens", "TTFT ms", "tokens/s"],
            ([f"{p.prompt_tokens}", f"{p.ttft_s * 1e3:.1f}", f"{p.prompt_tokens / p.ttft_s:.0f}"] for p in prefill),
        )
    )
    console.print(
        table(
            f"{name}: decode",
            ["at once", "context tokens", "ms a step", "tokens/s"],
            (
                [f"{p.batch}", f"{p.context_tokens}", f"{p.step_s * 1e3:.1f}", f"{p.batch / p.step_s:.0f}"]
                for p in decode
            ),
        )
    )
    console.print(
        f"prefill {fitted.prefill_tokens_per_s:.0f} tokens/s + {fitted.prefill_overhead_ms:.1f} ms + "
        f"{fitted.prefill_ms_per_1k_tokens_squared:.1f} ms × (1,000 tokens)² (error {fitted.prefill_error:.0%}); "
        f"decode {fitted.decode_ms:.2f} ms + {fitted.decode_ms_per_sequence:.3f} ms a sequence + "
        f"{fitted.decode_ms_per_1k_context_tokens:.3f} ms a 1,000 tokens of context "
        f"(error {fitted.decode_error:.0%})"
    )
    console.print(f"written: {out}", markup=False)
