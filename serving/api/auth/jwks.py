"""Public keys of an identity provider (JWKS): read, checked, kept, renewed; never on the way of a request.

Promises: what is fetched is bounded in bytes, keys and time, from one address without redirects; a shared secret, a
private key, a key for encryption and an RSA key below 2048 bits are no keys here; while the provider does not answer,
the keys it gave last stay good, up to a bound.
"""

from __future__ import annotations

import asyncio
import time
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
import structlog
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm
from jwt.exceptions import PyJWTError

from serving.config import OidcConfig

MAX_BYTES: Final = 256 * 1024
MAX_KEYS: Final = 64
# Keys of one name, for a provider that renews a key without renaming it.
MAX_OF_ONE_NAME: Final = 4
LEAST_RSA_BITS: Final = 2048
# However many tokens name a key that is not known, the provider is asked no more often.
LEAST_INTERVAL_S: Final = 10.0
FIRST_RETRY_S: Final = 2.0
_RSA: Final = frozenset({"RS256", "RS384", "RS512", "PS256", "PS384", "PS512"})
_CURVES: Final = {
    "P-256": frozenset({"ES256"}),
    "P-384": frozenset({"ES384"}),
    "P-521": frozenset({"ES512"}),
    "Ed25519": frozenset({"EdDSA"}),
    "Ed448": frozenset({"EdDSA"}),
}
_PARSERS: Final[dict[str, Callable[[dict[str, Any]], Any]]] = {
    "RSA": RSAAlgorithm.from_jwk,
    "EC": ECAlgorithm.from_jwk,
    "OKP": OKPAlgorithm.from_jwk,
}

log = structlog.get_logger("galerne.auth")


class KeysError(Exception):
    """Keys that cannot be had; the message is for the operator."""


@dataclass(frozen=True, slots=True)
class PublicKey:
    """One key, and the algorithms it can check: those of its own kind, so that none is taken for another's."""

    kid: str | None
    algorithms: frozenset[str]
    key: Any


def parse(content: bytes) -> tuple[PublicKey, ...]:
    """The usable keys of a JWKS document; raises KeysError where there is none."""
    if len(content) > MAX_BYTES:
        raise KeysError(f"larger than {MAX_BYTES} bytes")
    try:
        document = msgspec.json.decode(content, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise KeysError("no JSON object") from None
    rows = document.get("keys")
    if not isinstance(rows, list) or len(rows) > MAX_KEYS:
        raise KeysError(f"'keys' must be a list of at most {MAX_KEYS}")
    found = tuple(key for row in rows if isinstance(row, dict) and (key := _key(row)) is not None)
    if not found:
        raise KeysError("no key that could check a signature")
    return found


def _key(row: dict[str, Any]) -> PublicKey | None:
    kind, kid, alg = row.get("kty"), row.get("kid"), row.get("alg")
    can = _RSA if kind == "RSA" else _CURVES.get(str(row.get("crv")), frozenset())
    if alg is not None:
        can = can & {str(alg)}
    operations = row.get("key_ops", ["verify"])
    usable = isinstance(operations, list) and "verify" in operations and row.get("use", "sig") == "sig"
    if kind not in _PARSERS or "d" in row or not can or not usable or not isinstance(kid, str | None):
        return None
    try:
        key = _PARSERS[kind](row)
    except (PyJWTError, ValueError, TypeError, KeyError):
        return None
    if kind == "RSA" and key.key_size < LEAST_RSA_BITS:
        return None
    return PublicKey(kid, can, key)


class KeyStore:
    """The newest keys of one provider."""

    def __init__(self, config: OidcConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._config = config
        self._clock = clock
        self._keys: tuple[PublicKey, ...] = ()
        self._at_s = float("-inf")
        self._wanted = asyncio.Event()

    def candidates(self, kid: str | None, algorithm: str) -> tuple[PublicKey, ...] | None:
        """Keys that may have signed, few; None: there are none at all, or they are too old to be believed.

        A token that names no key is taken where only one fits: the first of several would be a guess.
        """
        if not self._keys or self._clock() - self._at_s > self._config.keep_s:
            self._wanted.set()
            return None
        fit = tuple(key for key in self._keys if algorithm in key.algorithms and (kid is None or key.kid == kid))
        if kid is None:
            return fit if len(fit) == 1 else ()
        if not fit:
            self._wanted.set()
        return fit[:MAX_OF_ONE_NAME]

    def replace(self, keys: tuple[PublicKey, ...]) -> None:
        """Take newer keys."""
        self._keys, self._at_s = keys, self._clock()

    async def run(
        self,
        told: Callable[[bool], None],
        *,
        read: Callable[[OidcConfig], bytes] | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """Renew the keys until cancelled; `told` hears of each success and failure."""
        retry_s = FIRST_RETRY_S
        while True:
            self._wanted.clear()
            try:
                keys = parse(await asyncio.to_thread(read or read_keys, self._config))
            except Exception as error:
                # A reader's own mistake must not end the renewal either.
                log.warning("keys of an issuer were not renewed", issuer=self._config.id, problem=_told(error))
                told(False)
                wait_s, retry_s = retry_s, min(2 * retry_s, self._config.refresh_s)
            else:
                self.replace(keys)
                told(True)
                wait_s, retry_s = self._config.refresh_s, FIRST_RETRY_S
            await self._until(wait_s, sleep)

    async def _until(self, wait_s: float, sleep: Callable[[float], Awaitable[None]]) -> None:
        """So long, or less where a token names a key that is not known."""
        await sleep(min(LEAST_INTERVAL_S, wait_s))
        if wait_s > LEAST_INTERVAL_S:
            naps = [asyncio.ensure_future(sleep(wait_s - LEAST_INTERVAL_S)), asyncio.ensure_future(self._wanted.wait())]
            try:
                await asyncio.wait(naps, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for nap in naps:
                    nap.cancel()


def read_keys(config: OidcConfig) -> bytes:
    """The document of a provider; blocks, and raises KeysError or OSError."""
    if config.jwks_file is not None:
        with Path(config.jwks_file).open("rb") as file:
            return file.read(MAX_BYTES + 1)
    return _fetch(str(config.jwks_url), config.timeout_s)


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        """Whoever answers sends nobody elsewhere: the address was checked, another is not."""


def _fetch(url: str, timeout_s: float) -> bytes:
    request = urllib.request.Request(url, headers={"accept": "application/json"})  # noqa: S310 - checked: https or loopback
    deadline_s = time.monotonic() + timeout_s
    try:
        with urllib.request.build_opener(_NoRedirects).open(request, timeout=timeout_s) as answer:
            parts, size = [], 0
            while part := answer.read1(64 * 1024):
                parts.append(part)
                size += len(part)
                if size > MAX_BYTES:
                    raise KeysError(f"larger than {MAX_BYTES} bytes")
                if time.monotonic() > deadline_s:
                    raise KeysError(f"not whole after {timeout_s:g} s")
            return b"".join(parts)
    except urllib.error.HTTPError as error:
        error.close()
        raise KeysError(f"answered {error.code}") from None


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
