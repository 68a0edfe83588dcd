"""A small HTTP client that tells exactly what came: no proxy, no redirect, no retry, bounded in bytes and time."""

from __future__ import annotations

import http.client
import json
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from serving.errors import GalerneError

CONNECT_TIMEOUT_S = 10.0
MAX_ANSWER_BYTES = 8 * 1024 * 1024


class NoAnswer(GalerneError):
    """The cluster could not be reached, or its answer did not come whole."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer; `first_byte_s` counts from sending to the first line of the body."""

    status: int
    content_type: str
    body: bytes
    first_byte_s: float

    def json(self) -> Any:
        """The body as JSON; None where it is none."""
        try:
            return json.loads(self.body)
        except ValueError:
            return None

    def events(self) -> list[str]:
        """The `data` of each event of a stream; one that is not whole is not among them."""
        whole, _, _ = self.body.replace(b"\r\n", b"\n").rpartition(b"\n\n")
        blocks = whole.decode(errors="replace").split("\n\n")
        return [block.removeprefix("data:").strip() for block in blocks if block.startswith("data:")]


class Client:
    """Asks one cluster; `url` is its address, with or without `/v1` at the end."""

    def __init__(self, url: str, timeout_s: float) -> None:
        """`timeout_s` bounds one whole answer. Raises NoAnswer where `url` is no address."""
        parts = urlsplit(url)
        try:
            port = parts.port
        except ValueError:
            port = 0
        if parts.scheme not in {"http", "https"} or not parts.hostname or port == 0 or parts.query or parts.fragment:
            raise NoAnswer(f"{url!r} is no address; it must be like http://127.0.0.1:8000 or https://llm.example.org")
        self._secure = parts.scheme == "https"
        self._host, self._port = parts.hostname, port
        self._prefix = parts.path.rstrip("/").removesuffix("/v1")
        self._timeout_s = timeout_s

    def ask(self, method: str, path: str, key: str | None, content: Mapping[str, Any] | None = None) -> Answer:
        """One request on a connection of its own; raises NoAnswer."""
        headers = {"accept": "*/*", "user-agent": "galerne-verify"}
        body = None
        if key is not None:
            headers["authorization"] = f"Bearer {key}"
        if content is not None:
            headers["content-type"] = "application/json"
            body = json.dumps(content).encode()
        connection = self._connected()
        try:
            began_s = time.monotonic()
            connection.request(method, self._prefix + path, body, headers)
            response = connection.getresponse()
            return self._read(response, began_s)
        except TimeoutError as error:
            raise NoAnswer(f"no answer within {self._timeout_s:g} s") from error
        except (OSError, http.client.HTTPException, UnicodeError) as error:
            raise NoAnswer(f"no answer: {_reason(error)}") from error
        finally:
            connection.close()

    def _connected(self) -> http.client.HTTPConnection:
        connect_s = min(CONNECT_TIMEOUT_S, self._timeout_s)
        if self._secure:
            # Trusts what the system and SSL_CERT_FILE name: an authority of one's own goes there.
            context = ssl.create_default_context()
            connection: http.client.HTTPConnection = http.client.HTTPSConnection(
                self._host, self._port, timeout=connect_s, context=context
            )
        else:
            connection = http.client.HTTPConnection(self._host, self._port, timeout=connect_s)
        try:
            connection.connect()
        except OSError as error:
            raise NoAnswer(f"cannot connect to {self._host}: {_reason(error)}") from error
        connection.sock.settimeout(self._timeout_s)
        return connection

    def _read(self, response: http.client.HTTPResponse, began_s: float) -> Answer:
        parts, size, first_s = [], 0, 0.0
        while line := response.readline(MAX_ANSWER_BYTES):
            now_s = time.monotonic()
            first_s = first_s or now_s - began_s
            parts.append(line)
            size += len(line)
            if size > MAX_ANSWER_BYTES:
                raise NoAnswer(f"the answer is larger than {MAX_ANSWER_BYTES} bytes")
            if now_s - began_s > self._timeout_s:
                raise TimeoutError
        if response.length:
            raise http.client.IncompleteRead(b"", response.length)
        return Answer(response.status, response.headers.get("content-type", ""), b"".join(parts), first_s)


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__
