"""The command line: `galerne serve | config | models | keys | status`."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.live import Live
from rich.table import Table

from serving import __version__
from serving.api.auth import new_key
from serving.cli import state
from serving.config import GalerneConfig
from serving.config_file import load
from serving.errors import ConfigError, GalerneError

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Galerne: a self-hosted serving cluster for open-weight language models.",
)
config_app = typer.Typer(no_args_is_help=True, help="Check configuration files.")
models_app = typer.Typer(no_args_is_help=True, help="Prepare and list model weights.")
keys_app = typer.Typer(no_args_is_help=True, help="Make API keys.")
app.add_typer(config_app, name="config")
app.add_typer(models_app, name="models")
app.add_typer(keys_app, name="keys")

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
) -> None:
    """Serve the models of CONFIG on this machine until Ctrl-C."""
    from serving.cli import lifecycle

    path = _config_path(config)
    loaded = load(path)
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

    from serving.cli import overview as view

    directory = state.state_dir(port)
    document = state.read(directory)
    if as_json:
        print(json.dumps({"url": document["url"], "replicas": [asdict(r) for r in view.rows(document)]}))
        return
    if once or not console.is_terminal:
        console.print(view.table(document, view.rows(document)))
        return
    with Live(console=console, auto_refresh=False) as live:
        while True:
            try:
                document = state.read(directory)
                live.update(view.table(document, view.rows(document)), refresh=True)
                time.sleep(REFRESH_S)
            except KeyboardInterrupt:
                return


@app.command()
def version() -> None:
    """Print the version."""
    print(__version__)


@config_app.command("check")
def config_check(config: ConfigArgument) -> None:
    """Check CONFIG and name every problem with file, line and what is allowed."""
    path = _config_path(config)
    loaded = load(path)
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


@keys_app.command("new")
def keys_new(
    name: Annotated[str, typer.Option("--id", help="Id of the key within its tenant.")] = "key-1",
) -> None:
    """Make a key: shown once here, stored nowhere; the configuration keeps its digest."""
    key, digest = new_key()
    console.print(f"key (shown once): {key}", soft_wrap=True, highlight=False)
    console.print("for tenants[].keys in the configuration:", highlight=False)
    console.print(f'  - {{id: {name}, sha256: "{digest}"}}', soft_wrap=True, highlight=False, markup=False)


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
