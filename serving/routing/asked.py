"""What routing may know of a request: how long its prompt is, how it begins, which session it belongs to.

The prompt is read when the first choice needs it, and once: a model with one replica never pays for it.
"""

from __future__ import annotations

from serving.routing.choice import Wanted
from serving.routing.fingerprint import fingerprint, of_length, prompt_bytes


class Asked:
    """One request, for the life of it; retries ask again."""

    __slots__ = ("_adapter", "_body", "_generates", "_owner", "_prompt_bytes", "_session", "_wanted")

    def __init__(
        self,
        body: bytes,
        owner: tuple[str, ...],
        *,
        prompt_bytes: int,
        generates: bool,
        session: bytes | None = None,
        adapter: str | None = None,
    ) -> None:
        """`owner` (tenant, model) as the engine's cache tells prompts apart; `generates`: the route caches prefixes."""
        self._body = body
        self._owner = owner
        self._adapter = adapter
        self._prompt_bytes = prompt_bytes
        self._generates = generates
        # A tenant's session is nobody else's.
        self._session = None if session is None else "\0".join((*owner, session.decode("latin-1")))
        self._wanted: Wanted | None = None

    def wanted(self, *, reads_prompts: bool, key: bytes) -> Wanted:
        """For the router; `reads_prompts`: its policy compares them; `key`: of their hashes."""
        if self._wanted is None:
            if reads_prompts and self._generates:
                prefix = fingerprint(prompt_bytes(self._body), *self._owner, key=key)
            else:
                prefix = of_length(self._prompt_bytes)
            self._wanted = Wanted(prefix, self._session, self._adapter)
            self._body = b""
        return self._wanted
