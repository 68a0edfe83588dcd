"""`make chart`: writes what the chart has from elsewhere, or with --check says what is not up to date.

values.schema.json and README's table come from the comments of values.yaml and Galerne's configuration model, the
rules from `galerne rules`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from helm.tools.schema import schema
from helm.tools.values import Value, read
from serving.metrics.prometheus import rule_file

CHART = Path(__file__).parent.parent / "galerne"
BEGIN, END = "<!-- values: begin -->", "<!-- values: end -->"
RULES_NOTE = "# Made by `make chart` from serving/metrics (`galerne rules`).\n"


def generated() -> dict[Path, str]:
    """Every generated file with what it has to say."""
    values = read(CHART / "values.yaml")
    readme = (CHART / "README.md").read_text()
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return {
        CHART / "values.schema.json": json.dumps(schema(values), indent=1, ensure_ascii=False) + "\n",
        CHART / "README.md": f"{before}{BEGIN}\n{table(values)}{END}{after}",
        CHART / "files" / "galerne.rules.yaml": RULES_NOTE + rule_file(),
    }


def table(values: tuple[Value, ...]) -> str:
    """README's table: one row a value."""
    rows = ["| value | default | what it is |", "|---|---|---|"]
    rows += [
        f"| `{'.'.join(v.path)}` | {_cell(v.default)} | {v.text.replace('|', '&#124;')} |" for v in _leaves(values)
    ]
    return "\n".join(rows) + "\n"


def _leaves(values: tuple[Value, ...]) -> Iterator[Value]:
    for value in values:
        if value.children:
            yield from _leaves(value.children)
        else:
            yield value


def _cell(default: Any) -> str:
    return "" if default == "" else f"`{json.dumps(default, ensure_ascii=False)}`"


def main() -> int:
    """Write, or check; the exit status."""
    stale = [path for path, text in generated().items() if not path.exists() or path.read_text() != text]
    if "--check" in sys.argv[1:]:
        for path in stale:
            print(f"{path} is not what `make chart` writes", file=sys.stderr)
        return bool(stale)
    for path in stale:
        path.write_text(generated()[path])
        print(f"wrote {path.relative_to(CHART.parent.parent)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
