"""Prepares model weights with progress bars: before a cluster starts, and by `galerne models prepare`."""

from __future__ import annotations

import os
import time

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from serving.config import GalerneConfig
from serving.engine import sources
from serving.engine.sources.adapters import prepare_adapter


def prepare_models(config: GalerneConfig, console: Console) -> None:
    """Prepare every source of the configuration; raises SourceError."""
    served = [m for m in config.models if not m.is_fake]
    for source in dict.fromkeys(m.source for m in served):
        prepare(source, console)
    for source in dict.fromkeys(adapter.source for m in served for adapter in m.adapters):
        # Some megabytes: nothing to watch.
        prepare_adapter(source, sources.cache_root(os.environ))


def prepare(source: str, console: Console) -> sources.PreparedModel:
    """Prepare one source, showing its steps; returns at once where it is prepared already."""
    cache = sources.cache_root(os.environ)
    if sources.is_prepared(source, cache) is not None:
        return sources.prepare(source, cache)
    started_s = time.monotonic()
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bars:
        task = bars.add_task(source, total=None)

        def show(progress: sources.Progress) -> None:
            bars.update(
                task,
                description=f"{source}: {progress.step}",
                completed=progress.done_bytes,
                total=progress.total_bytes,
            )

        prepared = sources.prepare(source, cache, show)
    console.print(f"prepared {source} in {time.monotonic() - started_s:.0f} s ({prepared.size_bytes / 1e6:.0f} MB)")
    return prepared
