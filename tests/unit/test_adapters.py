"""LoRA adapters: configuration, sources, catalogue, and the fake engine that answers under their names."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from pydantic import ValidationError

from serving.api.app import Gateway
from serving.api.auth import digest
from serving.config import FakeEngineConfig, GalerneConfig, ModelConfig
from serving.engine.fake import build_app
from serving.engine.private_server import PrivateServer
from serving.engine.sources.adapters import prepare_adapter, rank
from serving.engine.vllm_engine import lora_arguments
from serving.errors import EngineError, SourceError
from serving.metrics.gateway import GatewayMetrics
from serving.routing.replicas import Endpoint
from tests.unit.test_billing import Kept

ALL, BASE_ONLY = "sk-all", "sk-base"
BODY = {"messages": [{"role": "user", "content": "bonjour " * 400}], "max_tokens": 2}


def configuration(adapters: list[dict[str, str]], **model: object) -> GalerneConfig:
    return GalerneConfig.model_validate(
        {
            "models": [
                {"id": "base", "source": "fake:base", "adapters": adapters} | model,
                {"id": "other", "source": "fake:other"},
            ],
            "tenants": [
                {"id": "press", "keys": [{"id": "a", "sha256": digest(ALL)}]},
                {"id": "school", "keys": [{"id": "a", "sha256": digest(BASE_ONLY)}], "models": ["base"]},
            ],
        }
    )


def adapter(tmp_path: Path, **config: object) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"r": 8} | config))
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    return folder


@pytest.mark.parametrize(
    ("adapters", "model", "complaint"),
    [
        ([{"id": "base", "source": "path:/a"}], {}, "the same value stands twice"),
        ([{"id": "other", "source": "path:/a"}], {}, "the same value stands twice"),
        ([{"id": "x", "source": "s3://a"}], {}, "no kind of adapter source"),
        ([{"id": "x", "source": "path:/a"}], {"task": "embed"}, "models that generate text"),
        ([], {"lora": {"slots": 4, "cached": 2}}, "cached \\(2\\) is below slots \\(4\\)"),
        ([], {"lora": {"max_rank": 17}}, "Input should be 1, 8, 16"),
        ([], {"engine": {"max_loras": 4}}, "max_loras cannot be set here"),
    ],
)
def test_a_wrong_configuration_says_what_is_wrong(
    adapters: list[dict[str, str]], model: dict[str, object], complaint: str
) -> None:
    with pytest.raises(ValidationError, match=complaint):
        configuration(adapters, **model)


def test_a_tenant_may_be_given_an_adapter_by_name() -> None:
    config = configuration([{"id": "press-style", "source": "path:/a"}])
    found = config.model_dump()
    found["tenants"][1]["models"] = ["press-style"]
    assert GalerneConfig.model_validate(found).tenants[1].models == ("press-style",)
    found["tenants"][1]["models"] = ["press-stile"]
    with pytest.raises(ValidationError, match="models: base, other, press-style"):
        GalerneConfig.model_validate(found)


@pytest.mark.parametrize(
    ("missing", "complaint"),
    [("adapter_config.json", "no adapter_config.json"), ("adapter_model.safetensors", "no adapter_model.safetensors")],
)
def test_an_incomplete_adapter_is_named(tmp_path: Path, missing: str, complaint: str) -> None:
    folder = adapter(tmp_path)
    assert prepare_adapter(f"path:{folder}", tmp_path) == folder
    (folder / missing).unlink()
    with pytest.raises(SourceError, match=complaint):
        prepare_adapter(f"path:{folder}", tmp_path)


@pytest.mark.parametrize("found", [{"r": "8"}, {"r": None}])
def test_an_adapter_without_a_rank_is_refused(tmp_path: Path, found: dict[str, object]) -> None:
    with pytest.raises(SourceError, match="rank"):
        prepare_adapter(f"path:{adapter(tmp_path, **found)}", tmp_path)


def test_a_random_adapter_is_built_once_and_fits_the_random_model(tmp_path: Path) -> None:
    first = prepare_adapter("random:lora?seed=1", tmp_path, env=os.environ)
    written = (first / "adapter_model.safetensors").stat().st_mtime_ns
    assert prepare_adapter("random:lora?seed=1", tmp_path, env=os.environ) == first
    assert (first / "adapter_model.safetensors").stat().st_mtime_ns == written
    assert rank(first) == 8
    raw = (first / "adapter_model.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert header["base_model.model.model.layers.3.self_attn.v_proj.lora_B.weight"]["shape"] == [128, 8]
    other = prepare_adapter("random:lora?seed=2", tmp_path, env=os.environ)
    assert (other / "adapter_model.safetensors").read_bytes() != raw


@pytest.mark.parametrize("source", ["random:mistral", "random:lora?ranks=4", "random:lora?hidden=3", "s3://x"])
def test_an_unknown_source_is_refused(tmp_path: Path, source: str) -> None:
    with pytest.raises(SourceError):
        prepare_adapter(source, tmp_path)


def test_a_rank_beyond_the_models_bound_says_which_field(tmp_path: Path) -> None:
    model = ModelConfig.model_validate({"id": "base", "source": "fake:base", "lora": {"max_rank": 1}})
    with pytest.raises(EngineError, match=r"'style' has rank 8: set lora\.max_rank of model 'base'"):
        lora_arguments(model, {"style": adapter(tmp_path)})
    assert lora_arguments(model, {}) == {}


def test_vllm_is_told_every_adapter_and_the_bounds(tmp_path: Path) -> None:
    model = ModelConfig.model_validate({"id": "base", "source": "fake:base", "lora": {"slots": 2}})
    folder = adapter(tmp_path)
    found = lora_arguments(model, {"style": folder})
    (module,) = found.pop("lora_modules")
    assert (module.name, module.path, module.base_model_name) == ("style", str(folder), "base")
    assert found == {"enable_lora": True, "max_loras": 2, "max_cpu_loras": 4, "max_lora_rank": 16}


async def test_adapters_are_listed_answered_billed_and_kept_from_who_may_not(tmp_path: Path) -> None:
    config = configuration([{"id": "press-style", "source": "path:/a"}])
    ledger = Kept(tmp_path)
    app = Gateway(config, engine_token="t", metrics=GatewayMetrics(lambda: 0.0), ledger=ledger)
    fake = build_app(FakeEngineConfig(decode_ms=1), "base", adapters=["press-style"])
    await fake.start()
    engine = PrivateServer(fake, host="127.0.0.1", token="t")
    front = PrivateServer(app, host="127.0.0.1", token="")
    await engine.start()
    await front.start()
    app.update_replicas("base", (Endpoint("r0", engine.host, engine.port),))

    def client(key: str) -> httpx.AsyncClient:
        headers = {"authorization": f"Bearer {key}"}
        return httpx.AsyncClient(base_url=f"http://127.0.0.1:{front.port}", headers=headers, timeout=20)

    async with client(ALL) as http, client(BASE_ONLY) as narrow:
        cards = {card["id"]: card for card in (await http.get("/v1/models")).json()["data"]}
        assert list(cards) == ["base", "press-style", "other"]
        assert (cards["press-style"]["parent"], cards["press-style"]["ready_replicas"]) == ("base", 1)
        assert "parent" not in cards["base"]
        assert (await http.get("/v1/models/press-style")).json()["parent"] == "base"

        async def ask(name: str) -> tuple[str, int]:
            answer = (await http.post("/v1/chat/completions", json=BODY | {"model": name})).json()
            return answer["model"], answer["usage"]["prompt_tokens_details"]["cached_tokens"]

        # A prefix computed without the adapter is none of the adapter's.
        assert await ask("base") == ("base", 0)
        assert await ask("press-style") == ("press-style", 0)
        name, cached = await ask("press-style")
        assert name == "press-style"
        assert cached > 0

        assert [card["id"] for card in (await narrow.get("/v1/models")).json()["data"]] == ["base"]
        refused = await narrow.post("/v1/chat/completions", json=BODY | {"model": "press-style"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (404, "model_not_found")
        assert (await narrow.get("/v1/models/press-style")).status_code == 404
    assert [row.model for row in ledger.rows] == ["base", "press-style", "press-style"]
    app.close()
    for server in (front, engine):
        await server.stop()


def test_a_fake_engine_knows_its_adapters_only() -> None:
    request = SimpleNamespace(model="nobody", cache_salt=None)
    engine = build_app(FakeEngineConfig(), "base", adapters=["style"])._engine
    with pytest.raises(Exception, match="nobody"):
        engine.check_model(request)
    assert engine.check_model(SimpleNamespace(model="style", cache_salt=None)) == "style"
    assert engine.check_model(SimpleNamespace(model=None, cache_salt=None)) == "base"
