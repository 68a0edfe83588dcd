"""What a vLLM engine on processors needs before it starts: its environment, its number format, forks that are cheap."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any

from serving.config import ModelConfig

START_METHOD = "VLLM_WORKER_MULTIPROC_METHOD"
BINDING = "VLLM_CPU_OMP_THREADS_BIND"
# Processors that multiply bfloat16 themselves, as Linux names it on x86 and on Arm.
BFLOAT16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})


def threads(model: ModelConfig) -> int:
    """Threads that each worker of an engine computes with: the CPUs it was given, else all cores between them."""
    if model.resources.cpus is not None:
        return max(1, int(model.resources.cpus))
    return max(1, len(os.sched_getaffinity(0)) // model.parallel.workers)


def processor_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """What this machine's processor says it can do."""
    for line in cpuinfo.read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() in {"flags", "Features"}:
            return frozenset(value.split())
    return frozenset()


def dtype(flags: frozenset[str]) -> str:
    """Number format of weights and activations: where bfloat16 is emulated, float32 is several times as fast."""
    return "bfloat16" if flags & BFLOAT16_FLAGS else "float32"


def environment(environ: Mapping[str, str], threads: int, site_packages: Path) -> dict[str, str]:
    """What a CPU engine's process has to find in its environment when it loads its libraries.

    OpenMP reads it once, and the forked worker inherits what was read. Threads are not pinned: several engines
    share the cores of a machine, and vLLM's own choice would put each on the same ones. An operator who sets
    VLLM_CPU_OMP_THREADS_BIND gets vLLM's pinning, and workers that are spawned for it.
    """
    preload = [str(library) for library in sorted(site_packages.glob("torch/lib/libgomp*.so*"))[:1]]
    if known := environ.get("LD_PRELOAD"):
        preload.append(known)
    return {
        BINDING: environ.get(BINDING, "nobind"),
        # Ray sets the variable too, by its own rule.
        "OMP_NUM_THREADS": str(threads),
        "LD_PRELOAD": ":".join(preload),
    }


def start_method(environ: Mapping[str, str]) -> str:
    """How a CPU engine starts its core and workers; only a spawned worker takes a binding of its own."""
    return "fork" if environ.get(BINDING, "nobind") == "nobind" else "spawn"


def join_core(parallel: Any, environ: Mapping[str, str]) -> None:
    """Have a single worker compute in the engine core's own process; `parallel` is vLLM's, after its own checks.

    Those give it a process of its own, whose OpenMP settings could not be made otherwise; here they stand before
    either starts. Apart, the core asks for every step's result in a loop that never sleeps, on the cores that compute.
    """
    if parallel.world_size == 1 and start_method(environ) == "fork":
        parallel.distributed_executor_backend = "uni"


def inspect_models_here() -> None:
    """Read a model class's traits in this process.

    vLLM imports itself in a further process to keep CUDA out of this one, and remembers the answer on disk: without
    CUDA that is a second import of vLLM at the first start of every model.
    """
    from vllm.model_executor.models import registry

    registry._run_in_subprocess = lambda inspect: inspect()


def _count_compilation() -> None:
    """Have a worker add what its first run takes to vLLM's own count of compilation.

    On processors vLLM compiles in that run, in a mode for which it counts nothing; its workers inherit this.
    """
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    first_run = CPUModelRunner.warming_up_model

    def counted(runner: Any) -> None:
        began_s = time.perf_counter()
        first_run(runner)  # which it leaves out where nothing is compiled
        runner.vllm_config.compilation_config.compilation_time += time.perf_counter() - began_s

    CPUModelRunner.warming_up_model = counted


def prepare_fork(environ: MutableMapping[str, str]) -> None:
    """Import what the core and the workers import, where all of them inherit it.

    To be called once vLLM's configuration stands: making it, vLLM asks for spawned processes.
    """
    environ[START_METHOD] = start_method(environ)
    import vllm.v1.engine.core
    import vllm.v1.executor.multiproc_executor
    import vllm.v1.worker.cpu_model_runner
    import vllm.v1.worker.cpu_worker  # noqa: F401

    _count_compilation()
    # No collection, here or in a fork, walks these objects again and so copies their pages.
    gc.freeze()
