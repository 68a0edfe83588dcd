"""The converter process: makes a directory that vLLM opens from a GGUF file, or from a seed.

    python -m serving.engine.sources.convert gguf FILE OUT
    python -m serving.engine.sources.convert random TOKENIZER_DIR OUT OPTIONS_JSON
    python -m serving.engine.sources.convert lora OUT OPTIONS_JSON

It is a process of its own so that its memory is given back and its parent imports no model library. It
needs numpy, gguf and tokenizers, and on purpose neither torch nor transformers: importing those takes
longer than the whole conversion. Standard output carries one JSON object a line: {"step", "done", "total"},
or a last {"errno", "filename", "error"}.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

from serving.engine.sources.random_options import LoraOptions, Options


def main(arguments: list[str]) -> int:
    """Run one conversion; 0 where it succeeded."""
    try:
        from serving.engine.sources import gguf_llama, random_lora, random_mistral

        match arguments:
            case ["gguf", file, out]:
                # Parsing the token lists in its header takes as long as the rest.
                _say({"step": "read", "done": 0, "total": None})
                gguf_llama.convert(Path(file), Path(out), _reporter("dequantise"))
            case ["random", tokenizer, out, options]:
                shape = Options(**json.loads(options))
                random_mistral.make(Path(tokenizer), Path(out), shape, _reporter("write"))
            case ["lora", out, options]:
                random_lora.make(Path(out), LoraOptions(**json.loads(options)), _reporter("write"))
            case _:
                print(__doc__, file=sys.stderr)
                return 2
    except OSError as error:
        _say({"errno": error.errno, "filename": error.filename, "error": str(error)})
        return 1
    except ImportError as error:
        _say(
            {
                "errno": None,
                "filename": None,
                "error": f"the Python package {error.name} is missing; install galerne[cpu]",
            }
        )
        return 1
    except (ValueError, KeyError) as error:
        what = f"{error} is missing in its header" if isinstance(error, KeyError) else str(error)
        _say({"errno": None, "filename": None, "error": what})
        return 1
    return 0


def _reporter(step: str) -> Callable[[int, int], None]:
    return lambda done, total: _say({"step": step, "done": done, "total": total})


def _say(line: dict[str, object]) -> None:
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
