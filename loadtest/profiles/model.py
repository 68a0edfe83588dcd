"""A measured engine as a document: what was measured, on what, and the few numbers that describe it."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from loadtest.errors import LoadtestError
from loadtest.strict import Strict

BUNDLED = "loadtest.profiles"
_Positive = Annotated[float, Field(gt=0)]
_Count = Annotated[int, Field(ge=1)]


class PrefillPoint(Strict):
    """One prompt alone on the engine: seconds to its first token (median of several)."""

    prompt_tokens: _Count
    ttft_s: _Positive


class DecodePoint(Strict):
    """So many requests of about this context at once: seconds between two tokens of one (median)."""

    batch: _Count
    context_tokens: _Count
    step_s: _Positive


class Fit(Strict):
    """What the points follow, with k for a thousand tokens.

    ttft = overhead + tokens / prefill rate + attention × k²
    step = base + per sequence × batch + per context × batch × k

    The errors are root mean squares, relative to the mean of what was measured.
    """

    prefill_tokens_per_s: _Positive
    prefill_overhead_ms: Annotated[float, Field(ge=0)]
    # Attention: what a prompt's length costs beyond its rate.
    prefill_ms_per_1k_tokens_squared: Annotated[float, Field(ge=0)] = 0.0
    prefill_error: Annotated[float, Field(ge=0)]
    decode_ms: Annotated[float, Field(ge=0)]
    decode_ms_per_sequence: Annotated[float, Field(ge=0)]
    # Of all sequences' contexts together, a thousand tokens of it.
    decode_ms_per_1k_context_tokens: Annotated[float, Field(ge=0)]
    decode_error: Annotated[float, Field(ge=0)]

    def ttft_s(self, prompt_tokens: int) -> float:
        """Seconds to the first token of a prompt that is alone on the engine."""
        thousands = prompt_tokens / 1000
        attention_ms = self.prefill_ms_per_1k_tokens_squared * thousands * thousands
        return prompt_tokens / self.prefill_tokens_per_s + (self.prefill_overhead_ms + attention_ms) / 1e3

    def step_s(self, batch: int, context_tokens: float) -> float:
        """Seconds of a decode step of `batch` sequences with so much context each."""
        context_ms = self.decode_ms_per_1k_context_tokens * batch * context_tokens / 1000
        return (self.decode_ms + self.decode_ms_per_sequence * batch + context_ms) / 1e3


class EngineProfile(Strict):
    """One engine on one machine."""

    version: Literal[1] = 1
    name: str
    model: str
    when: str
    simulated: bool
    machine: dict[str, Any]
    engine: dict[str, Any]
    # From the start of the cluster to its readiness; None where it ran already.
    start_s: Annotated[float, Field(gt=0)] | None = None
    prefill: Annotated[tuple[PrefillPoint, ...], Field(strict=False, min_length=2)]
    decode: Annotated[tuple[DecodePoint, ...], Field(strict=False, min_length=2)]
    fit: Fit
    # What a reader must know (other work on the machine, say).
    remarks: Annotated[tuple[str, ...], Field(strict=False)] = ()

    def as_fake(self) -> dict[str, float]:
        """The latency fields of a configuration's `fake` section: this engine's speed without the engine.

        The fake engine knows no cost of context and one rate of prefill: both are those of the middle of what was
        measured, and the overhead of a prompt is in its rate.
        """
        prompts = sorted(point.prompt_tokens for point in self.prefill)
        prompt = prompts[len(prompts) // 2]
        contexts = sorted(point.context_tokens for point in self.decode)
        middle = contexts[len(contexts) // 2]
        of_context = self.fit.decode_ms_per_1k_context_tokens * middle / 1000
        return {
            "prefill_tokens_per_s": round(prompt / self.fit.ttft_s(prompt), 1),
            "decode_ms": round(self.fit.decode_ms, 3),
            "decode_ms_per_sequence": round(self.fit.decode_ms_per_sequence + of_context, 4),
        }


def bundled() -> list[str]:
    """Names of the profiles that come with the load tester."""
    folder = resources.files(BUNDLED)
    return sorted(entry.name.removesuffix(".json") for entry in folder.iterdir() if entry.name.endswith(".json"))


def load_profile(name: str | Path) -> EngineProfile:
    """A bundled profile by its name, or one in a file. Raises LoadtestError with what is wrong or known."""
    try:
        if str(name) in bundled():
            text = resources.files(BUNDLED).joinpath(f"{name}.json").read_text(encoding="utf-8")
        else:
            text = Path(name).read_text(encoding="utf-8")
    except OSError as problem:
        raise LoadtestError(
            f"{name}: no such profile ({problem.strerror}); give a file or one of: {', '.join(bundled()) or 'none'}"
        ) from problem
    try:
        return EngineProfile.model_validate_json(text)
    except ValidationError as problem:
        raise LoadtestError(f"{name}: not an engine's profile: {problem.errors(include_input=False)[0]}") from None
