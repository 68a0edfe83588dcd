"""Names of other projects that are not public API, held against the installed versions: an upgrade fails here first."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
from pathlib import Path

import pytest

from serving.config import FakeEngineConfig, engine_args
from serving.engine.fake.metrics import EngineMetrics
from serving.engine.fake.scheduler import Scheduler
from serving.engine.vllm_load import VllmLoad
from serving.metrics.prometheus import rule_file

ROOT = Path(__file__).parents[2]
RAY_MODULES = ("serving/cluster/ray.py", "serving/cluster/placement.py", "serving/cluster/failed_starts.py")


def imported_names() -> list[tuple[str, str]]:
    """(module, name) of everything that our Ray modules import from Ray, and what they replace there."""
    found = [("ray.serve._private.replica", "add_port_to_grpc_server")]
    for path in RAY_MODULES:
        tree = ast.parse((ROOT / path).read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "ray":
                found += [(str(node.module), alias.name) for alias in node.names]
    return found


@pytest.mark.parametrize(("module", "name"), imported_names())
def test_ray_has_what_we_use(module: str, name: str) -> None:
    loaded = importlib.import_module(module)
    assert hasattr(loaded, name) or importlib.util.find_spec(f"{module}.{name}")


def test_vllm_has_what_we_replace() -> None:
    # Read, not imported: the unit tests do not load vLLM.
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        pytest.skip("vLLM is not installed")
    registry = Path(spec.origin).parent / "model_executor" / "models" / "registry.py"
    functions = {n.name for n in ast.walk(ast.parse(registry.read_text())) if isinstance(n, ast.FunctionDef)}
    assert "_run_in_subprocess" in functions
    assert "_run_in_subprocess(" in registry.read_text().split("def inspect_model_cls", 2)[2]
    worker = Path(spec.origin).parent / "v1" / "worker"
    assert "def warming_up_model(self)" in (worker / "cpu_model_runner.py").read_text()
    assert "self.model_runner.warming_up_model()" in (worker / "cpu_worker.py").read_text()
    # What our mixin reads in a worker, and that its name is free there.
    assert "compilation_config.compilation_time" in (worker.parent / "engine" / "core.py").read_text()
    assert "encoder_compilation_time" in (worker.parent / "engine" / "core.py").read_text()
    assert "galerne_" not in (worker / "worker_base.py").read_text()
    # What the accounts of serving.engine.vllm_work wrap and read.
    processor = (worker.parent / "engine" / "output_processor.py").read_text()
    for called in (
        "def add_request(\n        self,\n        request: EngineCoreRequest,\n        prompt: str | None,",
        "def abort_requests(self, request_ids: Iterable[str], internal: bool) -> list[str]:",
        "def _finish_request(self, req_state: RequestState) -> None:",
        "self._finish_request(req_state)",
        "self.prompt_len = ",
        "self.is_prefilling = True",
        "self.num_cached_tokens = 0",
        "self.stats = RequestStateStats(arrival_time=arrival_time) if log_stats else None",
    ):
        assert called in processor, called
    # What serving.engine.vllm_guard wraps: every request to the core comes from these two, with its ids.
    inputs = (worker.parent / "engine" / "input_processor.py").read_text()
    assert "self.process_inputs_async = make_async(\n            self.process_inputs," in inputs
    made = inputs.split("def process_inputs(", 1)[1].split("\n    def ", 1)[0]
    assert ") -> EngineCoreRequest:" in made
    assert "prompt_token_ids=prompt_token_ids," in made
    assert "sampling_params.update_from_tokenizer(self.tokenizer)" in made
    params = (worker.parent.parent / "sampling_params.py").read_text()
    assert "def bad_words_token_ids(self) -> list[list[int]] | None:" in params
    # And that it compares all other ids with its model's size.
    for name in ("logprob_token_ids", "stop_token_ids", "logit_bias", "allowed_token_ids"):
        assert f"self._validate_{name.replace('logprob_token_ids', 'logprobs')}(model_config)" in params, name
    assert params.count("token_id < 0 or token_id >= vocab_size") >= 4
    # A sequence's tokens are counted before its end is told.
    outputs = processor.split("def process_outputs(", 1)[1]
    assert outputs.index("self._update_stats_from_output(") < outputs.index("self._finish_request(")
    # What serving.engine.vllm_load is called for: an object with these methods, for each core, once a pass.
    loggers = (worker.parent / "metrics" / "loggers.py").read_text()
    adapter = loggers.split("class PerEngineStatLoggerAdapter", 1)[1].split("\nclass ", 1)[0]
    assert "= per_engine_stat_logger_factory(\n                vllm_config, engine_index\n            )" in adapter
    assert set(re.findall(r"per_engine_stat_loggers?(?:\[engine_idx\])?\.(\w+)\(", adapter)) == {
        *("record", "log", "log_engine_initialized", "values")
    }
    assert all(callable(getattr(VllmLoad().logger(None), name)) for name in ("record", "log", "log_engine_initialized"))
    assert "if not custom_prometheus_logger:" in loggers, "vLLM's own metrics stay beside it"
    stats = (worker.parent / "metrics" / "stats.py").read_text().split("class SchedulerStats:", 1)[1]
    for field in ("num_running_reqs: int", "num_waiting_reqs: int", "num_skipped_waiting_reqs: int", "kv_cache_usage"):
        assert f"    {field}" in stats.split("\nclass ", 1)[0], field
    client = (worker.parent / "engine" / "async_llm.py").read_text()
    assert len(re.findall(r"= (?:await )?self\.input_processor\.process_inputs(?:_async)?\(", client)) == 4
    assert client.count("stat_loggers: list[StatLoggerFactory] | None = None") >= 2
    assert "self.output_processor.add_request(request, prompt, parent_req, index, queue)" in client
    assert "self.output_processor.abort_requests(request_ids, internal)" in client


def test_every_argument_of_vllm_is_allowed_or_refused_with_a_reason() -> None:
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        pytest.skip("vLLM is not installed")
    root = Path(spec.origin).parent
    known: set[str] = set()
    for path, classes in (
        ("engine/arg_utils.py", {"EngineArgs", "AsyncEngineArgs"}),
        ("entrypoints/launchers/cli_args.py", {"BaseFrontendArgs", "FrontendArgs"}),
    ):
        for node in ast.parse((root / path).read_text()).body:
            if isinstance(node, ast.ClassDef) and node.name in classes:
                known |= {
                    n.target.id for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)
                }
    known = {name for name in known if not name.startswith("_")}
    assert len(known) > 200
    assert known == engine_args.ALLOWED | engine_args.REFUSED.keys()
    assert not engine_args.ALLOWED & engine_args.REFUSED.keys()


def test_engines_export_what_the_rules_read() -> None:
    read = {re.sub(r"_(total|sum|count|bucket)$", "", name) for name in re.findall(r"vllm:\w+", rule_file())}
    assert len(read) >= 5
    scheduler = Scheduler(FakeEngineConfig())
    fake = {f.name for f in EngineMetrics(scheduler, "m", 1024).collect()}
    assert read <= fake, read - fake
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        pytest.skip("vLLM is not installed")
    source = (Path(spec.origin).parent / "v1" / "metrics" / "loggers.py").read_text()
    assert {name for name in read if f'name="{name}"' not in source} == set()
