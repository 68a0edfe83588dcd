"""Model hub sources: which files are taken, the cache without a network, and a hub that says no.

The hub is a small HTTP server on loopback that speaks the three calls the library makes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

import pytest

from serving.engine.sources import Progress, is_prepared, prepare
from serving.engine.sources.adapters import prepare_adapter
from serving.engine.sources.hub import hub_cache, split, wanted_files
from serving.errors import SourceError

SHA = "1" * 40
OFFLINE = {"HF_HUB_OFFLINE": "1"}
MODEL = {
    "config.json": json.dumps({"architectures": ["LlamaForCausalLM"]}),
    "tokenizer.json": "{}",
    "model.safetensors": "weights",
    "README.md": "not needed",
    "original/consolidated.00.pth": "a copy",
}


class Hub(BaseHTTPRequestHandler):
    """Repository `org/model`; `org/gated` is answered 403, all others 401."""

    files: Mapping[str, str] = MODEL

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def _answer(self, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        if "org/gated" in path:
            return self._send(403, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"})
        if "org/model" not in path:
            return self._send(401, b"", {"X-Error-Code": "RepoNotFound"})
        if "/nosuch" in path:
            return self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        if "/tree/" in path:
            entries = [
                {"type": "file", "path": name, "size": len(content), "oid": etag(content)}
                for name, content in self.files.items()
            ]
            return self._send(200, json.dumps(entries).encode() if body else b"")
        if path.startswith("/api/models/"):
            siblings = [{"rfilename": name, "size": len(content)} for name, content in self.files.items()]
            info = {"id": "org/model", "sha": SHA, "siblings": siblings, "private": False, "tags": []}
            return self._send(200, json.dumps(info).encode())
        content = self.files[path.partition(f"/resolve/{SHA}/")[2]]
        headers = {"X-Repo-Commit": SHA, "ETag": f'"{etag(content)}"'}
        return self._send(200, content.encode(), headers, body=body)

    def _send(self, status: int, content: bytes, headers: Mapping[str, str] | None = None, body: bool = True) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        pass


def etag(content: str) -> str:
    return hashlib.sha1(content.encode(), usedforsecurity=False).hexdigest()


@contextmanager
def serve() -> Iterator[dict[str, str]]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}"}
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def snapshot(cache: Path, repository: str, revision: str, files: Mapping[str, str]) -> Path:
    """A hub cache as the library lays it out: refs, blobs, and links in the snapshot."""
    root = cache / "huggingface" / f"models--{repository.replace('/', '--')}"
    path = root / "snapshots" / SHA
    path.mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs" / revision).write_text(SHA)
    (root / "blobs").mkdir()
    for name, content in files.items():
        (root / "blobs" / etag(name)).write_text(content)
        (path / name).symlink_to(root / "blobs" / etag(name))
    return path


HF = ["config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize(
    ("names", "mistral_format", "expected"),
    [
        # one set of weights, no copies, no code
        (
            [
                *HF,
                INDEX,
                "pytorch_model.bin",
                "original/params.json",
                "onnx/model.json",
                "modeling.py",
                "a.md",
            ],
            False,
            [*HF, INDEX],
        ),
        # both formats: Hugging Face's, unless vLLM is told to load Mistral's
        (
            [*HF, INDEX, "consolidated.safetensors", "params.json", "tekken.json"],
            False,
            [*HF, INDEX, "params.json", "tekken.json"],
        ),
        (
            [*HF, INDEX, "consolidated.safetensors", "params.json", "tekken.json"],
            True,
            ["config.json", "consolidated.safetensors", "params.json", "tekken.json"],
        ),
        # several consolidated files with their index
        (
            ["consolidated-00001-of-00002.safetensors", "consolidated.safetensors.index.json", "params.json"],
            False,
            ["consolidated-00001-of-00002.safetensors", "consolidated.safetensors.index.json", "params.json"],
        ),
        # asked for but not there
        ([*HF, INDEX], True, [*HF, INDEX]),
        (
            ["config.json", "pytorch_model.bin", "training_args.bin", "tokenizer.model"],
            False,
            ["config.json", "pytorch_model.bin", "tokenizer.model"],
        ),
        (
            ["tokenizer.model.v3", "a.safetensors", "adapter_x.safetensors"],
            False,
            ["a.safetensors", "tokenizer.model.v3"],
        ),
        # what a sentence-embedding model keeps in folders
        (["1_Pooling/config.json", "modules.json"], False, ["1_Pooling/config.json", "modules.json"]),
        ([], False, []),
    ],
)
def test_wanted_files(names: list[str], mistral_format: bool, expected: list[str]) -> None:
    assert wanted_files(names, mistral_format) == sorted(expected)


@pytest.mark.parametrize("rest", ["model", "a/b/c", "../x", "a/..", "a/b@", "a/b@../x", "a b/c", "/x", "a/", "-a/b"])
def test_a_malformed_repository_is_refused(tmp_path: Path, rest: str) -> None:
    with pytest.raises(SourceError, match=r"not of the form hf:ORGANISATION/NAME\[@REVISION\]"):
        prepare(f"hf:{rest}", tmp_path, env=OFFLINE)


def test_split() -> None:
    assert split("org/name") == ("org/name", None)
    assert split("org/name@v1.0") == ("org/name", "v1.0")


def test_where_the_cache_is(tmp_path: Path) -> None:
    assert hub_cache(tmp_path, {}) == tmp_path / "huggingface"
    assert hub_cache(tmp_path, {"HF_HOME": "/a"}) == Path("/a/hub")
    assert hub_cache(tmp_path, {"HF_HOME": "/a", "HF_HUB_CACHE": "/b"}) == Path("/b")


@pytest.mark.parametrize(("revision", "suffix"), [("main", ""), ("v2", "@v2")])
def test_a_cached_repository_needs_no_network(tmp_path: Path, revision: str, suffix: str) -> None:
    files = {"config.json": MODEL["config.json"], "model.safetensors": "weights"}
    path = snapshot(tmp_path, "org/model", revision, files)
    prepared = prepare(f"hf:org/model{suffix}", tmp_path, env=OFFLINE)
    assert prepared.path == path
    assert prepared.architecture == "LlamaForCausalLM"
    assert prepared.size_bytes == sum(len(content) for content in files.values())
    assert is_prepared(f"hf:org/model{suffix}", tmp_path, OFFLINE) == path


def test_offline_and_not_cached(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"no snapshot of it is there.*HF_HUB_OFFLINE forbids"):
        prepare("hf:org/model", tmp_path, env=OFFLINE)
    assert is_prepared("hf:org/model", tmp_path, OFFLINE) is None


def test_offline_and_half_cached(tmp_path: Path) -> None:
    shards = {"weight_map": {"a": "model-00001-of-00001.safetensors"}}
    snapshot(tmp_path, "org/model", "main", {"config.json": "{}", "a.safetensors": "", INDEX: json.dumps(shards)})
    with pytest.raises(SourceError, match=r"incomplete: .* not there: model-00001-of-00001.safetensors"):
        prepare("hf:org/model", tmp_path, env=OFFLINE)


def test_a_model_that_vllm_loads_in_mistrals_format_is_cached_only_with_it(tmp_path: Path) -> None:
    name = "mistralai/Ministral-8B-Instruct-2410"
    path = snapshot(tmp_path, name, "main", {"config.json": "{}", "model.safetensors": ""})
    with pytest.raises(SourceError, match=r"no consolidated\*.safetensors"):
        prepare(f"hf:{name}", tmp_path, env=OFFLINE)
    (path / "consolidated.safetensors").write_text("")
    assert prepare(f"hf:{name}", tmp_path, env=OFFLINE).path == path


def test_a_download_takes_what_is_needed_and_happens_once(tmp_path: Path) -> None:
    steps: list[Progress] = []
    with serve() as env:
        prepared = prepare("hf:org/model", tmp_path, steps.append, env)
    names = {p.relative_to(prepared.path).as_posix() for p in prepared.path.rglob("*") if p.is_file()}
    assert names == {"config.json", "tokenizer.json", "model.safetensors"}
    total = sum(len(MODEL[name]) for name in names)
    assert steps[0] == Progress("download", 0, total)
    assert steps[-1] == Progress("download", total, total)
    # The server is gone: the second time must not ask it.
    again: list[Progress] = []
    assert prepare("hf:org/model", tmp_path, again.append, env) == prepared
    assert again == []


@pytest.mark.parametrize(
    ("rest", "complaint"),
    [
        ("org/gated", "hf:org/gated is gated: accept its licence"),
        ("org/absent", "hf:org/absent does not exist at the model hub, or this machine may not see it"),
        ("org/model@nosuch", "org/model has no revision 'nosuch'"),
    ],
)
def test_what_the_hub_refuses(tmp_path: Path, rest: str, complaint: str) -> None:
    with serve() as env, pytest.raises(SourceError, match=complaint):
        prepare(f"hf:{rest}", tmp_path, env=env)


def test_a_hub_that_cannot_be_reached(tmp_path: Path) -> None:
    with serve() as env:
        pass  # its port is closed again
    with pytest.raises(SourceError, match=r"cannot be reached.*HF_ENDPOINT"):
        prepare("hf:org/model", tmp_path, env=env)


def test_an_adapter_takes_its_two_files_and_then_needs_no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = {"adapter_config.json": '{"r": 8}', "adapter_model.safetensors": "weights", "tokenizer.json": "{}"}
    monkeypatch.setattr(Hub, "files", adapter | {"adapter_model.bin": "pickled"})
    with serve() as env:
        path = prepare_adapter("hf:org/model", tmp_path, env=env)
    assert sorted(file.name for file in path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert prepare_adapter("hf:org/model", tmp_path, env=OFFLINE) == path
