"""Pages of other origins that may call the API from a browser."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from serving.config.base import Frozen

# A scheme, a host and perhaps a port, as browsers send it: no path, no slash at the end.
ORIGIN = r"^(\*|https?://[A-Za-z0-9.\-]+(:[0-9]{1,5})?|https?://\[[0-9a-fA-F:]+\](:[0-9]{1,5})?)$"


class CorsConfig(Frozen):
    """Who may call from a browser. A key in a page is a key in everybody's hands: give it few scopes and a quota."""

    # As browsers send it: `https://app.example`, with a port where there is one; `*`: every page.
    origins: Annotated[tuple[Annotated[str, Field(pattern=ORIGIN, max_length=256)], ...], Field(min_length=1)]
    # Seconds for which a browser keeps the answer and does not ask again. Chromium keeps none longer than two hours.
    max_age_s: Annotated[int, Field(ge=0, le=86400, strict=True)] = 600
