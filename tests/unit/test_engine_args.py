"""What a model's `engine` section may set, by whatever name vLLM would take it."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from serving.config import GalerneConfig, ModelConfig
from serving.engine.presets import PRESETS, engine_args


def model(engine: dict[str, Any]) -> ModelConfig:
    return ModelConfig.model_validate({"id": "m", "source": "path:/m", "engine": engine})


@pytest.mark.parametrize(
    "engine",
    [
        {"max_model_len": 32768, "dtype": "float32", "enforce_eager": True, "max_num_seqs": 16},
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4}},
        {"kv_transfer_config": {"kv_connector": "OffloadingConnector", "kv_role": "kv_both"}},
        {"structured_outputs_config": {"backend": "guidance"}},
        {"compilation_config": {"backend": "inductor", "cudagraph_capture_sizes": [1, 2]}},
        {"hf_overrides": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}},
        {"chat_template": "{{ messages }}", "default_chat_template_kwargs": {"enable_thinking": False}},
        {"quantization": "fp8", "load_format": "mistral", "tokenizer_mode": "mistral"},
    ],
)
def test_what_tunes_an_engine_passes(engine: dict[str, Any]) -> None:
    assert model(engine).engine == engine


def test_presets_set_what_operators_may() -> None:
    for preset in PRESETS:
        model(engine_args(preset))


@pytest.mark.parametrize(
    ("engine", "part"),
    [
        # Code of others, by each spelling that vLLM's command line resolves.
        ({"trust_remote_code": True}, "runs code"),
        ({"trust-remote-code": True}, "runs code"),
        ({"--trust-remote-code": True}, "runs code"),
        ({"trust_remote": True}, "runs code"),
        ({"Trust_Remote_Code": True}, "runs code"),
        ({"no-trust-remote-code": False}, "runs code"),
        ({"worker_cls": "evil.Worker"}, "runs code"),
        ({"tool_parser_plugin": "/tmp/x.py"}, "runs code"),
        ({"tool-parser-p": "/tmp/x.py"}, "runs code"),
        ({"logits_processors": ["evil:P"]}, "runs code"),
        ({"middleware": ["evil.M"]}, "runs code"),
        ({"kv_transfer_config": {"kv_connector_module_path": "evil"}}, "runs code"),
        ({"kv_transfer_config": {"kv_connector_extra_config": {"spec_module_path": "evil"}}}, "runs code"),
        ({"kv_transfer_config": {"kv_connector_extra_config": {"tiers": [{"module_path": "evil"}]}}}, "runs code"),
        ({"kv_transfer_config.kv_connector_module_path": "evil"}, "must be written"),
        ({"structured_outputs_config": {"reasoning_parser_plugin": "/tmp/x.py"}}, "runs code"),
        ({"structured-outputs-config": {}}, "must be written as vLLM names the field: 'structured_outputs_config'"),
        ({"compilation_config": {"backend": "evil.compile"}}, "cannot name a Python object"),
        ({"compilation_config": {"inductor_passes": {"a": "evil.f"}}}, "runs code"),
        ({"speculative_config": {"trust-remote-code": True}}, "runs code"),
        ({"speculative_config": '{"code_revision": "x"}'}, "must be an object"),
        ({"hf_overrides": {"auto_map": {"AutoConfig": "evil"}}}, "runs code"),
        # What users send, in logs.
        ({"enable_log_requests": True}, "logs or files"),
        ({"enable-log-outputs": True}, "logs or files"),
        ({"enable_log": True}, "logs or files"),
        # Listeners, and what Galerne sets.
        ({"kv_events_config": {"publisher": "zmq"}}, "listener"),
        ({"kv_transfer_config": {"kv_ip": "0.0.0.0"}}, "listener"),  # noqa: S104
        ({"host": "0.0.0.0"}, "gateway"),  # noqa: S104
        ({"port": 1}, "gateway"),
        ({"tensor-parallel-size": 2}, "`parallel`"),
        ({"served_model_name": "x"}, "`source`"),
        ({"disable_log_stats": True}, "billed"),
        ({"chat_template_kwargs": {}}, "no argument"),
        ({"max_model_length": 1}, "did you mean 'max_model_len'"),
        ({"max-model-len": 1}, "must be written as vLLM names the field: 'max_model_len'"),
        ({"max_model": 1}, "must be written as vLLM names the field: 'max_model_len'"),
        ({"_api_process_rank": 1}, "no argument"),
        ({"": 1}, "no argument"),
    ],
)
def test_what_is_not_an_operators_is_refused_by_name(engine: dict[str, Any], part: str) -> None:
    with pytest.raises(ValidationError) as caught:
        model(engine)
    assert part in str(caught.value), str(caught.value)


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "0.0.0.0", "::", "::1", "fd00::1", "localhost", "galerne.example"],  # noqa: S104
)
def test_a_host_is_an_address_or_a_name(host: str) -> None:
    assert GalerneConfig.model_validate(configuration(host=host)).listen.host == host


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1:8300\n stats uri /x", "127.0.0.1\n", "a b", "", "*", "fe80::1%x", "a:b", "127.0.0.1 ssl crt /x", "a#"],
)
def test_a_host_adds_nothing_to_haproxys_configuration(host: str) -> None:
    with pytest.raises(ValidationError):
        GalerneConfig.model_validate(configuration(host=host))


@pytest.mark.parametrize(
    "more",
    [
        {"listen": {"port": True}},
        {"gateway": {"cpus": True}},
        {"gateway": {"metrics_port": True}},
        {"gateway": {"replicas": True}},
        {"limits": {"logprobs": False}},
        {"limits": {"n": True}},
        {"tracing": {"endpoint": "http://127.0.0.1:4318", "sample_ratio": True}},
    ],
)
def test_yes_is_no_number(more: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        GalerneConfig.model_validate(configuration() | more)


def configuration(**listen: Any) -> dict[str, Any]:
    return {
        "listen": listen,
        "models": [{"id": "m", "source": "fake:m"}],
        "tenants": [{"id": "t", "keys": [{"id": "k", "sha256": "0" * 64}]}],
    }
