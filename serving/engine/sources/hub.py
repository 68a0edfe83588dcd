"""Model hub repositories, through the hub's own cache.

Nothing is downloaded twice, and what is cached needs no network. What is cached wins over what is new:
`hf:org/name` keeps the snapshot it first got until the cache is emptied. Whoever wants another version names
it (`hf:org/name@revision`), so that a restart never changes a model.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from serving.engine.presets import preset_for
from serving.engine.sources import local, store
from serving.engine.sources.facts import Progress, ProgressFn
from serving.errors import SourceError

OFFLINE_VARIABLE = "HF_HUB_OFFLINE"
POLL_INTERVAL_S = 0.5

_REPOSITORY = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$", re.ASCII)
_REVISION = re.compile(r"^[A-Za-z0-9][\w./-]*$", re.ASCII)
_TRUE = {"1", "true", "yes", "on"}
# Configuration, tokenizer and template files. No *.py: code of a repository is never run.
_SMALL_SUFFIXES = {".json", ".txt", ".model", ".jinja", ".tiktoken"}
# Copies of the weights in other formats.
_COPIES = {"original", "onnx", "openvino", "metal", "gguf"}


@dataclass(frozen=True)
class Content:
    """What is wanted of a repository: a model's files, or an adapter's."""

    # A file that every snapshot of it has.
    probe: str
    # What a directory misses, in words.
    lacks: Callable[[Path], str | None]
    # (names, whether Mistral's own format is asked for) -> the files to take.
    wanted: Callable[[Iterable[str], bool], list[str]]


def split(rest: str) -> tuple[str, str | None]:
    """`org/name@revision` into its parts; SourceError where it is not of that form."""
    repository, at, revision = rest.partition("@")
    if not _REPOSITORY.match(repository) or (at and not _REVISION.match(revision)) or ".." in rest:
        raise SourceError(f"hf:{rest} is not of the form hf:ORGANISATION/NAME[@REVISION]")
    return repository, revision or None


def cached(rest: str, cache: Path, env: Mapping[str, str]) -> Path | None:
    """The complete snapshot in the cache, without any network; None where there is none."""
    return _cached(rest, cache, env, MODEL)[0]


def download(
    rest: str, cache: Path, progress: ProgressFn, env: Mapping[str, str], content: Content | None = None
) -> Path:
    """The snapshot of a repository, downloaded where the cache lacks it; a model's without `content`.

    Raises SourceError.
    """
    content = content or MODEL
    repository, revision = split(rest)
    path, why = _cached(rest, cache, env, content)
    if path is not None:
        return path
    if env.get(OFFLINE_VARIABLE, "").lower() in _TRUE:
        raise SourceError(
            f"hf:{rest} is not in the model cache {hub_cache(cache, env)} ({why}) and {OFFLINE_VARIABLE} "
            "forbids the download: fill the cache on a machine with a network and copy it here, or unset "
            f"{OFFLINE_VARIABLE}"
        )
    return _download(repository, revision, hub_cache(cache, env), progress, env, content)


def hub_cache(cache: Path, env: Mapping[str, str]) -> Path:
    """The hub's cache: where its own variables put it, else in Galerne's."""
    if own := env.get("HF_HUB_CACHE"):
        return Path(own).expanduser()
    if home := env.get("HF_HOME"):
        return Path(home).expanduser() / "hub"
    return cache / "huggingface"


def wanted_files(names: Iterable[str], mistral_format: bool) -> list[str]:
    """The files of a repository that an engine reads: one set of weights and everything small around it.

    Safetensors win over .bin. Mistral's consolidated.* files repeat the weights: they are taken where
    `mistral_format` asks for them or where there are no others.
    """
    names = list(names)
    top = [name for name in names if "/" not in name]
    tensors = [name for name in top if name.endswith(".safetensors") and not name.startswith("adapter_")]
    consolidated = [name for name in tensors if name.startswith("consolidated")]
    sharded = [name for name in tensors if name not in consolidated]
    pickled = [name for name in top if name.startswith("pytorch_model") and name.endswith(".bin")]
    weights = (consolidated if mistral_format else []) or sharded or consolidated or pickled
    stems = {name.split(".")[0].split("-")[0] for name in weights}
    small = [
        name
        for name in names
        if (PurePosixPath(name).suffix in _SMALL_SUFFIXES or name.startswith("tokenizer.model"))
        and PurePosixPath(name).parts[0] not in _COPIES
        and (not name.endswith(".index.json") or name.split(".")[0] in stems)
    ]
    return sorted({*weights, *small})


MODEL = Content("config.json", local.lacks, wanted_files)


def _wants_mistral_format(repository: str) -> bool:
    preset = preset_for(f"hf:{repository}")
    return preset is not None and preset.load_format == "mistral"


def _cached(rest: str, cache: Path, env: Mapping[str, str], content: Content) -> tuple[Path | None, str]:
    from huggingface_hub.errors import LocalEntryNotFoundError

    hub = _library()
    repository, revision = split(rest)
    mistral_format = _wants_mistral_format(repository)
    try:
        path = Path(
            hub.snapshot_download(
                repository,
                revision=revision,
                cache_dir=hub_cache(cache, env),
                local_files_only=True,
                # Judged below by what an engine needs; the library's own check wants every file there is.
                allow_patterns=[content.probe],
            )
        )
    except LocalEntryNotFoundError:
        return None, "no snapshot of it is there"
    missing = content.lacks(path)
    if missing is None and content is MODEL and mistral_format and not any(path.glob("consolidated*.safetensors")):
        missing = "it has no consolidated*.safetensors"
    return (path, "") if missing is None else (None, f"the snapshot is incomplete: {missing}")


def _download(
    repository: str,
    revision: str | None,
    directory: Path,
    progress: ProgressFn,
    env: Mapping[str, str],
    content: Content,
) -> Path:
    from huggingface_hub import errors

    hub = _library()
    name = f"hf:{repository}" + (f"@{revision}" if revision else "")
    access = {"token": env.get("HF_TOKEN") or None, "endpoint": env.get("HF_ENDPOINT") or None}
    total = 0
    try:
        info = hub.HfApi(**access).model_info(repository, revision=revision, files_metadata=True)
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
        files = content.wanted(sizes, _wants_mistral_format(repository))
        total = sum(sizes[file] for file in files)
        directory.mkdir(parents=True, exist_ok=True)
        blobs = directory / hub.constants.REPO_ID_SEPARATOR.join(["models", *repository.split("/")]) / "blobs"
        store.require_space(directory, total - store.bytes_below(blobs))
        with _reporting(blobs, total, progress):
            path = Path(
                hub.snapshot_download(
                    repository,
                    revision=revision,
                    cache_dir=directory,
                    allow_patterns=files,
                    tqdm_class=_silent_bar(),
                    **access,
                )
            )
    except errors.GatedRepoError as error:
        raise SourceError(
            f"{name} is gated: accept its licence on its page at the model hub, then set HF_TOKEN to a token "
            "of that account"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise SourceError(
            f"{repository} has no revision {revision!r} at the model hub; check the part after @"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise SourceError(
            f"{name} does not exist at the model hub, or this machine may not see it: check the name, and "
            "set HF_TOKEN if it is private"
        ) from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        raise SourceError(f"the model hub answered {status} for {name}; try again later") from error
    except Exception as error:
        # The library lets its HTTP client's own errors through, and those have no base that is stable.
        if isinstance(error, OSError) and error.errno is not None:
            raise store.unwritable(error, directory, total) from error
        raise SourceError(
            f"the model hub cannot be reached for {name} ({error}): check the network or HTTPS_PROXY, set "
            "HF_ENDPOINT to a mirror, or copy the model here and use path:DIRECTORY"
        ) from error
    if missing := content.lacks(path):
        raise SourceError(f"{name} is nothing that vLLM can open: {missing}")
    return path


def _library() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise SourceError(
            "hf: sources need the Python package huggingface_hub; install galerne[cpu] or [gpu]"
        ) from error
    return huggingface_hub


def _silent_bar() -> Any:
    from tqdm import tqdm  # type: ignore[import-untyped]

    class Silent(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)
            super().__init__(*args, **{**kwargs, "disable": True})

    return Silent


@contextmanager
def _reporting(blobs: Path, total_bytes: int, progress: ProgressFn) -> Iterator[None]:
    """Report how far `blobs` has grown; measured on the disk, as the library's bars differ by backend."""
    done = threading.Event()

    def report() -> None:
        while not done.wait(POLL_INTERVAL_S):
            progress(Progress("download", min(store.bytes_below(blobs), total_bytes), total_bytes))

    progress(Progress("download", min(store.bytes_below(blobs), total_bytes), total_bytes))
    reporter = threading.Thread(target=report, name="download-progress", daemon=True)
    reporter.start()
    try:
        yield
        progress(Progress("download", total_bytes, total_bytes))
    finally:
        done.set()
        reporter.join()
