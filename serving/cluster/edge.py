"""How HAProxy proves itself to a gateway: what it says of a client's address is told from what a client says.

An HMAC under the engine token, which HAProxy puts in place of whatever a client sent under that name. Only the standard
library is imported: HAProxy's own program does it at every reload.
"""

from __future__ import annotations

import hmac
from hashlib import sha256
from typing import Final

# What an engine's port asks for; HAProxy drops it from what clients send.
ENGINE_TOKEN_HEADER: Final = "x-galerne-engine-token"  # noqa: S105 - the name of a header
ENV_ENGINE_TOKEN: Final = "GALERNE_ENGINE_TOKEN"  # noqa: S105 - the name of a variable
HEADER: Final = "x-galerne-edge"
FORWARDED: Final = "x-forwarded-for"
# Of an answer that a gateway gave before the request had ended: HAProxy drops it and closes the connection.
EARLY: Final = "x-galerne-early"
# The token guards engines too; what it is used for here is told apart by this.
_PURPOSE: Final = b"galerne edge:"


def proof(engine_token: str) -> str:
    """The header's value; the same in every process of a cluster."""
    return hmac.new(engine_token.encode(), _PURPOSE, sha256).hexdigest()
