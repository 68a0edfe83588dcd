"""Which of vLLM's arguments a model's `engine` section may set, and why the others may not be.

An argument is taken by the exact name of its field (`max_model_len`): vLLM's command line also resolves hyphens,
abbreviations and `--config.key`, none of which reach it here, and each of which is refused with the name it stands for.
Every argument of the pinned vLLM stands in one of the two tables; a test fails when a new one appears.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

_SOURCE = "`source`, `id` and `adapters` of the model decide it"
_PLACE = "`parallel` and `resources` of the model decide it, and Galerne places its workers"
_CODE = "it runs code of your choosing in the engine"
_FRONT = "clients reach engines through the gateway alone, whose settings these are not"
_PRIVATE = "it writes what users send into logs or files"
_LISTENS = "it opens a listener that asks for no token"
_TEXT = "this cluster serves text only"
_TRACES = "`tracing` decides it"
_COUNTED = "the accounts by which requests are billed need it as it is"
_UNTRUSTED = "requests would decide what only an operator may"

REFUSED: Final[Mapping[str, str]] = {
    name: reason
    for reason, names in {
        _SOURCE: """model tokenizer served_model_name model_weights hf_config_path hf_token revision code_revision
            tokenizer_revision download_dir allow_deprecated_quantization enable_lora lora_modules max_loras
            max_cpu_loras max_lora_rank default_mm_loras""",
        _PLACE: """tensor_parallel_size pipeline_parallel_size distributed_executor_backend data_parallel_address
            data_parallel_backend data_parallel_external_lb data_parallel_hybrid_lb data_parallel_multi_port_external_lb
            data_parallel_rank data_parallel_rpc_port data_parallel_size_local data_parallel_start_rank
            data_parallel_supervisor_port dp_supervisor_probe_failure_threshold dp_supervisor_probe_interval_s
            dp_supervisor_probe_timeout_s device_ids master_addr master_port nnodes node_rank enable_elastic_ep
            ray_workers_use_nsight""",
        _CODE: """trust_remote_code worker_cls worker_extension_cls scheduler_cls logits_processors io_processor_plugin
            reasoning_parser_plugin tool_parser_plugin middleware log_config_file model_class_overrides
            ec_manager_config tool_server""",
        _FRONT: """host port uds root_path api_key allow_credentials allowed_headers allowed_methods allowed_origins
            ssl_ca_certs ssl_cert_reqs ssl_certfile ssl_ciphers ssl_keyfile enable_ssl_refresh h11_max_header_count
            h11_max_incomplete_event_size disable_fastapi_docs enable_offline_docs disable_uvicorn_access_log
            disable_access_log_for_endpoints uvicorn_log_level enable_request_id_headers tokens_only
            sse_keep_alive_interval shutdown_timeout enable_force_include_usage""",
        _PRIVATE: """enable_log_requests enable_log_outputs enable_log_deltas max_log_len log_error_stack
            profiler_config mm_encoder_fp8_scale_path mm_encoder_fp8_scale_save_path""",
        _LISTENS: "kv_events_config weight_transfer_config",
        _TEXT: """enable_prompt_embeds enable_mm_embeds allowed_local_media_path allowed_media_domains media_io_kwargs
            mm_processor_kwargs""",
        _TRACES: "otlp_traces_endpoint collect_detailed_traces",
        _COUNTED: "disable_log_stats aggregate_engine_logging",
        _UNTRUSTED: "trust_request_chat_template enable_trace_replay",
    }.items()
    for name in names.split()
}

ALLOWED: Final = frozenset(
    """
    additional_config all2all_backend async_scheduling attention_backend attention_config block_size
    chat_template chat_template_content_format cohere_format cohere_is_reasoning_model compilation_config config_format
    convert cp_kv_cache_interleave_size cpu_distributed_timeout_seconds cpu_offload_gb cpu_offload_params
    cudagraph_capture_sizes cudagraph_metrics data_parallel_size dbo_decode_token_threshold
    dbo_prefill_token_threshold dcp_comm_backend dcp_kv_cache_interleave_size dcp_q_replicate
    decode_context_parallel_size default_chat_template_kwargs diffusion_config disable_cascade_attn
    disable_chunked_mm_input disable_custom_all_reduce disable_hybrid_kv_cache_manager
    disable_nccl_for_dp_synchronization disable_sliding_window distributed_timeout_seconds dtype ec_transfer_config
    enable_auto_tool_choice enable_batch_sharded_sampling enable_bf16x3_router_gemm enable_chunked_prefill
    enable_cumem_allocator enable_dbo enable_ep_weight_filter enable_eplb enable_expert_parallel
    enable_fault_tolerance enable_flash_late_interaction enable_flashinfer_autotune enable_layerwise_nvtx_tracing
    enable_logging_iteration_details enable_mamba_cache_stochastic_rounding enable_mfu_metrics
    enable_mixed_moe_lora_format enable_mm_processor_stats enable_moe_shared_loras enable_per_request_metrics
    enable_prefix_caching enable_prompt_tokens_details enable_return_routed_experts enable_server_load_tracking
    enable_sleep_mode enable_tokenizer_info_endpoint enable_tower_connector_lora enforce_eager eplb_config
    exclude_tools_when_tool_choice_none expert_placement_strategy fail_on_environ_validation fault_tolerance_config
    fingerprint_mode fingerprint_value fully_sharded_loras gdn_prefill_backend generation_config
    gpu_memory_utilization hf_overrides ignore_patterns interleave_mm_strings ir_op_priority jit_monitor_mode
    jit_monitor_verbose kda_prefill_backend kernel_config kv_cache_dtype kv_cache_dtype_skip_layers
    kv_cache_memory_bytes kv_cache_metrics kv_cache_metrics_sample kv_offloading_backend kv_offloading_size
    kv_sharing_fast_prefill kv_transfer_config language_model_only limit_mm_per_prompt linear_backend load_format
    logprobs_mode long_prefill_token_threshold lora_dtype lora_target_modules mamba_backend mamba_block_size
    mamba_cache_dtype mamba_cache_mode mamba_cache_philox_rounds mamba_config mamba_ssm_cache_dtype
    mamba_ssu_algorithm max_cudagraph_capture_size max_logprobs max_model_len max_num_batched_tokens
    max_num_queued_reqs max_num_queued_tokens max_num_scheduled_tokens max_num_seqs max_parallel_loading_workers
    mm_device_do_normalize mm_encoder_attn_backend mm_encoder_attn_dtype mm_encoder_fp8_scale_save_margin
    mm_encoder_only mm_encoder_tp_mode mm_hasher_algorithm mm_ipc_gpu_memory_gb mm_processor_cache_gb
    mm_processor_cache_type mm_processor_device mm_shm_cache_max_object_size_mb mm_tensor_ipc model_impl
    model_loader_extra_config moe_backend num_gpu_blocks_override numa_bind numa_bind_cpus numa_bind_nodes
    offload_backend offload_group_size offload_num_in_group offload_params offload_prefetch_step optimization_level
    override_generation_config per_request_spec_decode_metrics performance_mode pooler_config
    prefill_context_parallel_size prefill_schedule_interval prefix_cache_retention_interval
    prefix_caching_hash_algo prefix_match_unit pt_load_map_location quantization quantization_config
    reasoning_config reasoning_parser renderer_num_workers replayssm_buffer_len response_role return_sampling_mask
    return_tokens_as_token_ids runner safetensors_load_strategy safetensors_prefetch_block_size
    safetensors_prefetch_num_threads scheduler_reserve_full_isl scheduling_policy seed
    show_hidden_metrics_for_version skip_mm_profiling skip_tokenizer_init spec_method spec_model spec_tokens
    specialize_active_lora speculative_config stream_interval structured_outputs_config tokenizer_mode
    tool_call_parser ubatch_size use_fp64_gumbel use_replayssm use_tqdm_on_load video_pruning_method
    video_pruning_rate watermark
    """.split()  # noqa: SIM905 - a table
)

# Keys inside of arguments that take objects, wherever they stand: each names a module or a class that vLLM imports,
# code of a model's author, or an address on which it listens.
REFUSED_KEYS: Final = re.compile(
    r".*(module_path|_cls|_class|plugin|qualname)|trust_remote_code|code_revision|logits_processors|auto_map|inductor_passes"
    r"|sentence_transformers|[ke][vc]_ip"
)
# In these a dotted value is the name of a Python object.
_QUALIFIED: Final = frozenset({"backend", "attention_backend", "quantization", "load_format", "custom_ops"})
_DOTTED: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)+(:[A-Za-z_].*)?")


def problems(arguments: Mapping[str, Any]) -> Iterator[str]:
    """A sentence for each argument that may not be set."""
    for written, value in arguments.items():
        head, *keys = re.split(r"[.+]", written.lstrip("-").replace("-", "_").lower())
        name, reason = _meant(head)
        if reason is not None:
            yield f"{_shown(written)} cannot be set here: {reason}"
        elif name is None:
            close = difflib.get_close_matches(head, ALLOWED, n=1)
            yield f"vLLM has no argument {_shown(written)}" + (f"; did you mean {close[0]!r}?" if close else "")
        elif written != name or keys:
            yield f"{_shown(written)} must be written as vLLM names the field: {name!r}" + (
                ", with an object for its keys" if keys else ""
            )
        else:
            yield from _inside(name, value)


def _shown(written: str) -> str:
    return written if written.isidentifier() else repr(written)


def _meant(head: str) -> tuple[str | None, str | None]:
    """The argument that vLLM's command line would take a name for, and why it is refused; None: for none."""
    if head in REFUSED or head in ALLOWED:
        return head, REFUSED.get(head)
    if head.startswith("no_") and head[3:] in REFUSED:
        return head[3:], REFUSED[head[3:]]
    begun = sorted(name for name in (*REFUSED, *ALLOWED) if head and name.startswith(head))
    for name in begun:
        if name in REFUSED:
            return name, REFUSED[name]
    return (begun[0], None) if len(begun) == 1 else (None, None)


def _inside(at: str, value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            name = str(key).replace("-", "_").lower()
            path = f"{at}.{key}"
            if found := next((part for part in name.split(".") if REFUSED_KEYS.fullmatch(part)), None):
                yield f"{path} cannot be set here: {_LISTENS if found.endswith('_ip') else _CODE}"
            else:
                yield from _inside(path, inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _inside(at, inner)
    elif isinstance(value, str):
        if at.rsplit(".", 1)[-1] in _QUALIFIED and _DOTTED.fullmatch(value):
            yield f"{at} cannot name a Python object: {_CODE}"
        elif value.lstrip()[:1] == "{" and not at.startswith("chat_template"):
            yield f"{at} must be an object, not JSON in a string: its keys are looked at"
