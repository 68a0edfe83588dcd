"""The command line: `galerne serve | cluster | config | explain | models | keys | rules | simulate | status | …`."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Annotated

import structlog
import typer
from rich.console import Console
from rich.live import Live
from rich.table import Table

from serving import __version__
from serving.cli import cluster, keys, simulate, state, usage
from serving.cli.explain import explain
from serving.cli.verify import verify
from serving.cluster.environment import past_proxies
from serving.config import GalerneConfig, Source
from serving.config_file import load
from serving.errors import ConfigError, GalerneError

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Galerne: a self-hosted serving cluster for open-weight language models.",
)
config_app = typer.Typer(no_args_is_help=True, help="Check configuration files.")
models_app = typer.Typer(no_args_is_help=True, help="Prepare and list model weights.")
app.add_typer(config_app, name="config")
app.add_typer(models_app, name="models")
app.add_typer(keys.app, name="keys")
app.add_typer(simulate.app, name="simulate")
app.add_typer(cluster.app, name="cluster")
app.add_typer(usage.app, name="usage")
app.command()(verify)
app.command()(explain)

DEMO = "demo"
DEMO_KEY = "sk-demo-press"
DEFAULT_PORT = 8000
REFRESH_S = 1.0

# On the stream of today, so that what libraries print can be sent elsewhere and ours not.
console = Console(file=sys.stdout)
errors = Console(stderr=True)

ConfigArgument = Annotated[
    str, typer.Argument(help="Configuration file, or the name of a bundled one.", metavar="CONFIG")
]


@app.callback()
def begin() -> None:
    """What every command begins with: standard output is the command's answer alone, and logs go where errors go.

    And a proxy of the environment is for what leaves the machine.
    """
    os.environ |= past_proxies(os.environ)
    # The stream of the moment, as with the consoles above.
    structlog.configure(logger_factory=lambda *_: structlog.PrintLogger(sys.stderr))


def main() -> None:
    """Entry point: a failure Galerne names is one readable message and status 1 or 2, never a traceback."""
    try:
        app()
    except ConfigError as error:
        errors.print("The configuration cannot be used:", style="bold red")
        for problem in error.problems:
            errors.print(f"  {problem}", markup=False, soft_wrap=True)
        sys.exit(2)
    except GalerneError as error:
        errors.print(f"galerne: {error}", markup=False, style="red", soft_wrap=True)
        sys.exit(1)


@app.command()
def serve(
    config: ConfigArgument = DEMO,
    fake: Annotated[
        bool, typer.Option("--fake", help="Put the fake engine (simulated tokens) behind every model.")
    ] = False,
    port: Annotated[int | None, typer.Option(help="Listen here instead of listen.port.")] = None,
    ready_file: Annotated[
        Path | None, typer.Option(help="Write the cluster's state here once it answers, as JSON.")
    ] = None,
    with_prometheus: Annotated[
        bool, typer.Option("--with-prometheus", help="Start Prometheus beside it, for autoscaling and alerts.")
    ] = False,
) -> None:
    """Serve the models of CONFIG on this machine until Ctrl-C."""
    from serving.cli import lifecycle

    path = _config_path(config)
    loaded = load(path)
    source = Source.of(path, loaded)
    if port is not None:
        loaded = GalerneConfig.model_validate(
            loaded.model_dump() | {"listen": loaded.listen.model_dump() | {"port": port}}
        )
    if fake:
        loaded = lifecycle.fake_models(loaded)
    plan = lifecycle.Plan(
        loaded,
        state.state_dir(loaded.listen.port),
        ready_file.absolute() if ready_file else None,
        DEMO_KEY if loaded.demo_keys else None,
        with_prometheus,
        source,
    )
    sys.exit(lifecycle.run(plan, console))


@app.command()
def status(
    port: Annotated[int, typer.Option(help="Port of the cluster.")] = DEFAULT_PORT,
    once: Annotated[bool, typer.Option("--once", help="Print one table and end.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON and end.")] = False,
) -> None:
    """Show models, replicas and queues of the cluster on this machine, live."""
    from dataclasses import asdict

    from serving.cli.overview import read, view

    directory = state.state_dir(port)
    document = state.read(directory)
    if as_json:
        print(json.dumps({"url": document["url"], **asdict(read(document))}))
        return
    if once or not console.is_terminal:
        console.print(view(document, read(document)))
        return
    with Live(console=console, auto_refresh=False) as live:
        while True:
            try:
                document = state.read(directory)
                live.update(view(document, read(document)), refresh=True)
                time.sleep(REFRESH_S)
            except KeyboardInterrupt:
                return


@app.command()
def rules(
    release: Annotated[
        str | None,
        typer.Option(
            help="Those of this release alone (the label galerne_release); without: of every one, each by itself."
        ),
    ] = None,
) -> None:
    """Print Prometheus' recording rules and alerts, for a Prometheus of your own."""
    from serving.metrics.prometheus import rule_file

    print(rule_file(release), end="")


@app.command()
def version() -> None:
    """Print the version."""
    print(__version__)


@config_app.command("check")
def config_check(config: ConfigArgument) -> None:
    """Check CONFIG and name every problem with file, line and what is allowed."""
    path = _config_path(config)
    loaded = load(path)
    if empty := keys.placeholders(loaded):
        told = f"{len(empty)} keys are placeholders" if len(empty) > 1 else "1 key is a placeholder"
        names = ", ".join(empty)
        console.print(f"{path}: {told} that nobody holds; `galerne keys new` makes real ones: {names}", soft_wrap=True)
    console.print(
        f"{path}: {len(loaded.models)} model(s), {len(loaded.tenants)} tenant(s), no problem found.",
        soft_wrap=True,
    )


@models_app.command("prepare")
def models_prepare(
    what: Annotated[
        str, typer.Argument(help="Configuration file, bundled name, or a source such as hf:org/name.")
    ] = DEMO,
) -> None:
    """Download and convert weights into the cache, so that a later start is quick and needs no network."""
    from serving.cli.prepare import prepare, prepare_models
    from serving.config import SOURCE_SCHEMES

    if what.partition(":")[0] in SOURCE_SCHEMES and ":" in what:
        console.print(str(prepare(what, console).path), soft_wrap=True)
    else:
        prepare_models(load(_config_path(what)), console)
        console.print("every model is prepared")


@models_app.command("list")
def models_list(config: ConfigArgument = DEMO) -> None:
    """List the models of CONFIG: source, preset, workers, and whether the weights are prepared."""
    from serving.engine import presets, sources

    cache = sources.cache_root(os.environ)
    view = Table("model", "task", "source", "preset", "workers", "prepared")
    for model in load(_config_path(config)).models:
        preset = model.preset or getattr(presets.preset_for(model.source), "name", "-")
        prepared = "simulated" if model.is_fake else "yes" if sources.is_prepared(model.source, cache) else "no"
        view.add_row(model.id, model.task, model.source, preset, str(model.parallel.workers), prepared)
    console.print(view)


@models_app.command("arguments")
def models_arguments(
    config: ConfigArgument = DEMO,
    gpu: Annotated[bool, typer.Option("--gpu", help="As on GPUs, for models that leave the choice open.")] = False,
) -> None:
    """Print what vLLM is told for each model of CONFIG whose weights are prepared, as JSON."""
    from serving.engine import sources
    from serving.engine.hosted import cpu_environment
    from serving.engine.vllm_engine import engine_arguments

    cache = sources.cache_root(os.environ)
    told = {}
    for model in load(_config_path(config)).models:
        prepared = None if model.is_fake else sources.is_prepared(model.source, cache)
        if prepared is None:
            continue
        on_gpu = model.resources.accelerator == "gpu" or (gpu and model.resources.accelerator == "auto")
        told[model.id] = {
            "arguments": engine_arguments(model, prepared, gpu=on_gpu),
            "environment": {} if on_gpu else cpu_environment(model),
        }
    print(json.dumps(told, indent=1))


def _config_path(name: str) -> Path:
    """A file as given; otherwise a bundled configuration of this name."""
    path = Path(name)
    if path.exists() or path.suffix:
        return path
    from importlib.resources import files

    bundled = Path(str(files("deployments") / "config"))
    if (found := bundled / f"{name}.yaml").exists():
        return found
    names = ", ".join(sorted(p.stem for p in bundled.glob("*.yaml")))
    raise ConfigError((f"{name}: no such file, and no bundled configuration of this name (bundled: {names})",))
