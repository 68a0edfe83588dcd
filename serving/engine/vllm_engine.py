"""vLLM in this process: AsyncLLM, and vLLM's own OpenAI app on top of it.

Built on vLLM directly and not on Ray Serve LLM's `LLMServer`. What that adds (Ray's own router, LoRA
multiplexing, chat methods behind deployment handles) is what Galerne replaces by relaying to vLLM's app; what it
costs was measured here: a second vLLM import in a Ray task before every engine start, pandas and pyarrow as
dependencies, and a telemetry actor. What it does well is kept: placement-group bundles per worker, with vLLM's
Ray executor where an engine has several GPU workers.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from serving.config import ModelConfig
from serving.engine import on_cpu, presets, vllm_guard, vllm_work
from serving.engine.host_spec import HostSpec
from serving.engine.late_head import LateHead
from serving.engine.private_server import App
from serving.engine.sources.adapters import rank
from serving.engine.vllm_load import VllmLoad
from serving.engine.worker_times import EXTENSION, METHOD
from serving.errors import EngineError

GIB = 1024**3


class VllmEngine:
    """One engine: `start` returns its app, `shutdown` ends its core and workers."""

    def __init__(self, spec: HostSpec) -> None:
        self._model = spec.model
        self._weights = spec.weights
        self._adapters = spec.adapters
        self._gpu = spec.gpu
        self._placement = spec.placement
        self._traces_url = spec.otlp_traces_url
        self.load = VllmLoad()
        self._client: Any = None
        self._app: Any = None

    async def start(self) -> App:
        """Load the model and build its app; raises EngineError with what is wrong."""
        from vllm.entrypoints.launchers.api_server.app_state import init_app_state
        from vllm.entrypoints.launchers.app import build_app
        from vllm.tokenizers.registry import TokenizerRegistry
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.async_llm import AsyncLLM

        args = self._arguments()
        # By its name alone: it is imported where a model has such a tokenizer.
        TokenizerRegistry.tokenizers["mistral"] = ("serving.engine.mistral_tokenizer", "PatientMistralTokenizer")
        if not self._gpu:
            on_cpu.inspect_models_here()
        try:
            config = args.engine.create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER)
            if self._placement is not None:
                from serving.cluster.placement import placement_group

                os.environ["RAY_ADDRESS"] = self._placement.address
                config.parallel_config.placement_group = placement_group(self._placement.group)
            elif not self._gpu:
                on_cpu.join_core(config.parallel_config, os.environ)
                on_cpu.prepare_fork(os.environ)
            self._client = AsyncLLM.from_vllm_config(
                vllm_config=config,
                usage_context=UsageContext.OPENAI_API_SERVER,
                enable_log_requests=False,
                disable_log_stats=False,
                stat_loggers=[self.load.logger],
            )
            vllm_work.watch(self._client.output_processor)
            vllm_guard.watch(self._client.input_processor, self.token_ids)
            await self._client.reset_mm_cache()
            tasks = await self._client.get_supported_tasks()
            app = build_app(args.namespace, tasks, config.model_config)
            await init_app_state(self._client, app.state, args.namespace, tasks)
        except Exception as error:
            raise EngineError(str(error)) from None
        self._app = app
        return LateHead(app, _told)

    async def compile_s(self) -> float:
        """Seconds that compilation took of the start; workers compile beside each other."""
        times: list[float] = await self._client.collective_rpc(METHOD)
        return max(times, default=0.0)

    def capacity(self) -> dict[str, int]:
        """What it computes at a time: sequences, and tokens of its KV cache where it says."""
        config = self._client.vllm_config
        found = {
            "sequences": config.scheduler_config.max_num_seqs,
            "kv_tokens": config.cache_config.kv_cache_size_tokens,
        }
        return {name: int(value) for name, value in found.items() if value}

    @property
    def token_ids(self) -> int:
        """How many token ids the model has: rows of its embedding, whose adapters add none."""
        return int(self._client.vllm_config.model_config.get_vocab_size())

    def attach(self, server: Any) -> None:
        """Tell vLLM's app its HTTP server, which it stops when its core has died."""
        self._app.state.server = server

    async def shutdown(self) -> None:
        """End the core and its workers."""
        if self._client is not None:
            self._client.shutdown(timeout=0)

    def _arguments(self) -> _Arguments:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.entrypoints.launchers.cli_args import FrontendArgs

        engine_fields = {f.name for f in dataclasses.fields(AsyncEngineArgs)}
        frontend_fields = {f.name for f in dataclasses.fields(FrontendArgs)}
        values = engine_arguments(self._model, self._weights, gpu=self._gpu)
        if self._traces_url is not None:
            values["otlp_traces_endpoint"] = self._traces_url
        values |= lora_arguments(self._model, self._adapters)
        if unknown := sorted(values.keys() - engine_fields - frontend_fields):
            raise EngineError(f"it has no argument {_suggest(unknown[0], engine_fields)}")
        engine = AsyncEngineArgs(**{k: v for k, v in values.items() if k in engine_fields})
        frontend = FrontendArgs(**{k: v for k, v in values.items() if k in frontend_fields})
        return _Arguments(engine, argparse.Namespace(**(vars(frontend) | vars(engine))))


@dataclasses.dataclass(frozen=True)
class _Arguments:
    engine: Any
    namespace: argparse.Namespace


def _told(error: Exception) -> tuple[int, dict[str, Any]]:
    """What vLLM says of an exception."""
    from vllm.entrypoints.serve.exception_handling.error_response import create_error_response

    found = create_error_response(error)
    return int(found.error.code), found.model_dump()


def engine_arguments(model: ModelConfig, weights: Path, *, gpu: bool) -> dict[str, Any]:
    """vLLM arguments of a model: what is safe, the preset, the operator's own, what Galerne decides; last wins."""
    preset = presets.by_name(model.preset) if model.preset else presets.preset_for(model.source)
    safe: dict[str, Any] = {
        "disable_fastapi_docs": True,
        "enable_log_requests": False,
        "disable_uvicorn_access_log": True,
        "enable_request_id_headers": False,
        "enable_prompt_tokens_details": True,  # cached tokens in `usage`
        "enable_tokenizer_info_endpoint": True,  # the gateway tells of it what is not of this machine
    }
    if model.task == "embed":
        safe["runner"] = "pooling"
    if not gpu:
        safe["kv_cache_memory_bytes"] = int(model.resources.cpu_kv_cache_gib * GIB)
        safe["dtype"] = on_cpu.dtype(on_cpu.processor_flags())
    decided: dict[str, Any] = {
        "model": str(weights),
        "served_model_name": [model.id],
        "worker_extension_cls": EXTENSION,
        "tensor_parallel_size": model.parallel.tensor,
        "pipeline_parallel_size": model.parallel.pipeline,
    }
    if model.parallel.workers > 1:
        # On GPUs each worker is a Ray actor in its own bundle of the replica's placement group, on whichever
        # node it lies; vLLM's CPU platform has the process executor only.
        decided["distributed_executor_backend"] = "ray" if gpu else "mp"
    return safe | (presets.engine_args(preset) if preset else {}) | model.engine | decided


def lora_arguments(model: ModelConfig, adapters: Mapping[str, Path]) -> dict[str, Any]:
    """vLLM arguments of a model's adapters; raises EngineError where one does not fit.

    vLLM opens each once as it starts, so that a broken one is known before anybody waits for it, and again whenever
    it is asked for and had made room for another.
    """
    if not adapters:
        return {}
    from vllm.entrypoints.openai.models.protocol import LoRAModulePath

    for name, path in adapters.items():
        if (found := rank(path)) > model.lora.max_rank:
            raise EngineError(f"adapter {name!r} has rank {found}: set lora.max_rank of model {model.id!r} to as much")
    return {
        "enable_lora": True,
        "max_loras": model.lora.slots,
        "max_cpu_loras": model.lora.in_memory,
        "max_lora_rank": model.lora.max_rank,
        "lora_modules": [LoRAModulePath(name, str(path), model.id) for name, path in adapters.items()],
    }


def _suggest(name: str, known: set[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"{name!r}" + (f"; did you mean {close[0]!r}?" if close else "")
