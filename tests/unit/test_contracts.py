"""Names of other projects that are not public API, held against the installed versions: an upgrade fails here first."""

from __future__ import annotations

import ast
import importlib
import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RAY_MODULES = ("serving/cluster/ray.py", "serving/cluster/placement.py")


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
