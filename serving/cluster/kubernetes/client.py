"""One connection to a Kubernetes API server, and what may go wrong on it, decided once.

The official client knows kubeconfigs, tokens, certificates and proxies; what is asked and answered stays JSON, the
same for core objects and for those of operators. Promised: a read survives dropped connections, 429 and 5xx within a
bound; a server's Retry-After is honoured up to a limit; a write is repeated only where it was certainly not taken, or
where its resource version makes a second one harmless; every failure is one of our errors, and a refusal names the
missing permission. The client's own retries are off: they would sleep where nobody sees it.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from serving.cluster.kubernetes.resources import Document, Resource, name_of, version_of
from serving.errors import (
    ApiBusy,
    ApiConflict,
    ApiDenied,
    ApiGone,
    ApiMissing,
    ApiUnreachable,
    ClusterError,
    KubernetesError,
)

CONNECT_TIMEOUT_S: Final = 5.0
READ_TIMEOUT_S: Final = 30.0
# A read is tried so often, and waits no longer than this between two tries, whatever the server asks for.
ATTEMPTS: Final = 5
FIRST_PAUSE_S: Final = 0.5
LONGEST_PAUSE_S: Final = 20.0
# A change is made anew on the newest object so often when others write too.
CONFLICT_ATTEMPTS: Final = 6
PAGE: Final = 250
MERGE_PATCH: Final = "application/merge-patch+json"
JSON: Final = "application/json"
_UNAUTHORIZED, _FORBIDDEN, _NOT_FOUND, _CONFLICT, _GONE, _BUSY = 401, 403, 404, 409, 410, 429
_SERVER_ERRORS: Final = range(500, 600)
_MESSAGE_CHARS: Final = 500

Query = Mapping[str, str | int]


@dataclass(frozen=True, slots=True)
class Listing:
    """Objects of a kind at one moment, and the resource version from which a watch goes on."""

    items: tuple[Document, ...]
    resource_version: str


@dataclass(frozen=True, slots=True)
class _Call:
    """One request, in RBAC's words too, so that a refusal can be explained."""

    method: str
    verb: str
    path: str
    group: str = ""
    resource: str = ""
    namespace: str | None = None
    query: Query | None = None
    body: Any = None
    content_type: str = JSON
    accept: str = JSON
    read_timeout_s: float = READ_TIMEOUT_S


class Client:
    """Reads and writes of one API server. `pause` sleeps between tries; nothing else here waits."""

    def __init__(self, api: Any, pause: Callable[[float], None] = time.sleep) -> None:
        """`api`: a kubernetes.client.ApiClient."""
        self._api = api
        self._pause = pause

    @property
    def address(self) -> str:
        """Of the API server."""
        return str(self._api.configuration.host)

    def close(self) -> None:
        """Give connections back."""
        self._api.close()

    def get(self, resource: Resource, namespace: str | None, name: str) -> Document:
        """One object; ApiMissing where there is none."""
        return self._document(self._call("GET", "get", resource, namespace, name))

    def list(self, resource: Resource, namespace: str | None = None, *, labels: str = "", fields: str = "") -> Listing:
        """Every object of a kind, read in parts; begun anew when the server has forgotten the first part."""
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return self._pages(resource, namespace, labels, fields)
            except ApiGone:
                if attempt == ATTEMPTS:
                    raise
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _pages(self, resource: Resource, namespace: str | None, labels: str, fields: str) -> Listing:
        found: list[Document] = []
        following = ""
        while True:
            query: dict[str, str | int] = {"limit": PAGE}
            query |= {"labelSelector": labels} if labels else {}
            query |= {"fieldSelector": fields} if fields else {}
            query |= {"continue": following} if following else {}
            page = self._document(self._call("GET", "list", resource, namespace, query=query))
            found += page.get("items") or []
            following = str((page.get("metadata") or {}).get("continue") or "")
            if not following:
                return Listing(tuple(found), version_of(page))

    def create(self, resource: Resource, namespace: str | None, document: Document) -> Document:
        """A new object; ApiConflict where one of its name exists."""
        return self._document(self._call("POST", "create", resource, namespace, body=document))

    def replace(self, resource: Resource, namespace: str | None, document: Document) -> Document:
        """The object as given, if it is still of the resource version it was read with; else ApiConflict."""
        if not version_of(document):
            raise ClusterError(f"{name_of(document)} has no resource version: it cannot be compared and swapped")
        return self._document(self._call("PUT", "update", resource, namespace, name_of(document), body=document))

    def modify(
        self, resource: Resource, namespace: str | None, name: str, change: Callable[[Document], Document | None]
    ) -> Document:
        """Read, change, write back if nobody wrote in between; else again from the newest.

        `change` gives the whole new object, or None where nothing is to be done; it may raise to give up.
        """
        for attempt in range(1, CONFLICT_ATTEMPTS + 1):
            read = self.get(resource, namespace, name)
            changed = change(json.loads(json.dumps(read)))
            if changed is None:
                return read
            try:
                return self.replace(resource, namespace, changed)
            except ApiConflict:
                if attempt == CONFLICT_ATTEMPTS:
                    raise
                self._pause(FIRST_PAUSE_S)
        raise AssertionError("unreachable: the last attempt returns or raises")

    def patch(self, resource: Resource, namespace: str | None, name: str, patch: Document) -> Document:
        """A merge patch, for single fields that only we set."""
        call = self._call("PATCH", "patch", resource, namespace, name, body=patch, content_type=MERGE_PATCH)
        return self._document(call)

    def post(self, resource: Resource, namespace: str, name: str, sub: str, body: Document) -> Document:
        """Create a subresource of an object, such as an eviction; asked once, whatever the answer."""
        call = self._call("POST", "create", resource, namespace, name, sub=sub, body=body)
        return _decode(self._once(call))

    def logs(self, namespace: str, pod: str, query: Query, resource: Resource) -> bytes:
        """The log of a container."""
        return self._answer(self._call("GET", "get", resource, namespace, pod, sub="log", query=query, accept="*/*"))

    def service(self, namespace: str, service: str, path: str, query: Query, resource: Resource) -> bytes:
        """GET from a service, through the API server's proxy; `service` is name:port."""
        call = self._call(
            "GET", "get", resource, namespace, service, sub=f"proxy/{path.lstrip('/')}", query=query, accept="*/*"
        )
        return self._answer(call)

    def raw(self, path: str) -> Document:
        """Discovery and the version: what every authenticated user may read."""
        return self._document(_Call("GET", "get", path))

    def stream(self, resource: Resource, namespace: str | None, query: Query, read_timeout_s: float) -> Iterator[bytes]:
        """Lines of a watch, until the server ends it; ApiUnreachable where it breaks."""
        call = self._call(
            "GET", "watch", resource, namespace, query={"watch": "true", **query}, read_timeout_s=read_timeout_s
        )
        response = self._open(call)
        try:
            rest = b""
            for chunk in response.response.stream(65536, decode_content=True):
                *lines, rest = (rest + chunk).split(b"\n")
                yield from (line for line in lines if line.strip())
        except Exception as error:
            raise ApiUnreachable(f"the watch broke off: {_brief(error)}") from error
        finally:
            response.response.close()
            response.response.release_conn()
        if rest.strip():
            raise ApiUnreachable("the watch broke off in the middle of an event")

    def _call(
        self,
        method: str,
        verb: str,
        resource: Resource,
        namespace: str | None,
        name: str | None = None,
        *,
        sub: str = "",
        query: Query | None = None,
        body: Any = None,
        content_type: str = JSON,
        accept: str = JSON,
        read_timeout_s: float = READ_TIMEOUT_S,
    ) -> _Call:
        plural = resource.plural + (f"/{sub.split('/', maxsplit=1)[0]}" if sub else "")
        path = resource.path(namespace, name, sub)
        scope = namespace if resource.namespaced else None
        return _Call(
            method, verb, path, resource.group, plural, scope, query, body, content_type, accept, read_timeout_s
        )

    def _document(self, call: _Call) -> Document:
        return _decode(self._answer(call))

    def _answer(self, call: _Call) -> bytes:
        """The body of a success; tries again what may be tried again."""
        pause_s = FIRST_PAUSE_S
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return self._once(call)
            except ApiBusy as error:
                if attempt == ATTEMPTS or error.budget:
                    raise
                wait_s = pause_s if error.retry_after_s is None else error.retry_after_s
            except (ApiUnreachable, KubernetesError) as error:
                unheard = isinstance(error, ApiUnreachable) or error.status in _SERVER_ERRORS
                # A PUT carries its resource version: where the first was taken, the second is a conflict.
                if attempt == ATTEMPTS or not unheard or call.method not in {"GET", "PUT"}:
                    raise
                wait_s = pause_s
            self._pause(min(wait_s, LONGEST_PAUSE_S))
            pause_s *= 2
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _once(self, call: _Call) -> bytes:
        response = self._open(call)
        try:
            body: bytes = response.read()
        except Exception as error:
            raise ApiUnreachable(f"{self.address} broke off: {_brief(error)}") from error
        return body

    def _open(self, call: _Call) -> Any:
        """The response of a success, its body unread."""
        headers = {"Accept": call.accept}
        if call.body is not None:
            headers["Content-Type"] = call.content_type
        request = self._api.param_serialize(
            method=call.method,
            resource_path=call.path,
            query_params=[(name, str(value)) for name, value in (call.query or {}).items()],
            header_params=headers,
            body=call.body,
            auth_settings=["BearerToken"],
        )
        try:
            response = self._api.call_api(*request, _request_timeout=(CONNECT_TIMEOUT_S, call.read_timeout_s))
        except Exception as error:
            # urllib3's errors and the client's for TLS; an exec plugin of a kubeconfig may raise anything.
            raise ApiUnreachable(
                f"the API server {self.address} cannot be reached: {_brief(error)}. Is the kubeconfig's context the "
                "one you mean, and the network or VPN to it up?"
            ) from error
        if not 200 <= response.status < 300:  # noqa: PLR2004  # HTTP's successes
            body = b""
            with contextlib.suppress(Exception):
                body = response.read()
            raise _refusal(call, response.status, dict(response.headers or {}), body)
        return response


def connect(kubeconfig: str | None = None, context: str | None = None) -> tuple[Client, str]:
    """The client of a kubeconfig, or of the pod this runs in, and its namespace; ClusterError with what is wrong."""
    try:
        from kubernetes import client, config
    except ImportError as error:
        raise ClusterError("the Kubernetes client is not installed: pip install 'galerne[cluster]'") from error
    settings = client.Configuration()
    namespace = "default"
    try:
        if kubeconfig is None and context is None and in_pod():
            config.load_incluster_config(client_configuration=settings)
            namespace = _own_namespace()
        else:
            config.load_kube_config(config_file=kubeconfig, context=context, client_configuration=settings)
            contexts, active = config.list_kube_config_contexts(config_file=kubeconfig)
            chosen = next((c for c in contexts if c["name"] == context), active) if context else active
            namespace = (chosen.get("context") or {}).get("namespace") or namespace
    except Exception as error:
        # What is no kubeconfig fails in as many ways as there are files.
        raise ClusterError(
            f"no way to a cluster: {_brief(error)}. Name a kubeconfig with --kubeconfig or KUBECONFIG."
        ) from error
    settings.retries = False
    return Client(client.ApiClient(settings)), namespace


_SERVICE_ACCOUNT: Final = "/var/run/secrets/kubernetes.io/serviceaccount"


def in_pod() -> bool:
    """Whether this runs in a pod that has an account of its own."""
    import os
    from pathlib import Path

    return bool(os.environ.get("KUBERNETES_SERVICE_HOST")) and Path(_SERVICE_ACCOUNT, "token").exists()


def _own_namespace() -> str:
    from pathlib import Path

    try:
        return Path(_SERVICE_ACCOUNT, "namespace").read_text(encoding="utf-8").strip() or "default"
    except OSError:
        return "default"


def _refusal(call: _Call, status: int, headers: Mapping[str, str], body: bytes) -> KubernetesError:
    """The error of an answer that is no success."""
    try:
        said = json.loads(body)
    except ValueError:
        said = {}
    said = said if isinstance(said, dict) else {}
    text = str(said.get("message") or body.decode(errors="replace").strip() or f"HTTP status {status}")
    message = f"{call.verb} {call.resource or call.path}: {text[:_MESSAGE_CHARS]}"
    if status in {_UNAUTHORIZED, _FORBIDDEN}:
        return ApiDenied(message, status, call.verb, call.group, call.resource, call.namespace)
    if status == _BUSY:
        details = said.get("details") if isinstance(said.get("details"), dict) else {}
        causes = (details or {}).get("causes") or []
        budget = any(isinstance(c, dict) and c.get("reason") == "DisruptionBudget" for c in causes)
        return ApiBusy(message, status, _retry_after_s(headers, details or {}), budget)
    kinds = {_NOT_FOUND: ApiMissing, _CONFLICT: ApiConflict, _GONE: ApiGone}
    return kinds.get(status, KubernetesError)(message, status, str(said.get("reason") or ""))


def _retry_after_s(headers: Mapping[str, str], details: Mapping[str, Any]) -> float | None:
    found = {name.lower(): value for name, value in headers.items()}.get("retry-after")
    for value in (found, details.get("retryAfterSeconds")):
        with contextlib.suppress(TypeError, ValueError):
            return max(0.0, float(value))  # type: ignore[arg-type]  # None is suppressed
    return None


def _decode(body: bytes) -> Document:
    try:
        document = json.loads(body)
    except ValueError as error:
        raise KubernetesError("the API server's answer is no JSON: is this its address?") from error
    if not isinstance(document, dict):
        raise KubernetesError("the API server's answer is no object: is this its address?")
    return document


def _brief(error: BaseException) -> str:
    reason = getattr(error, "reason", None) or error
    return str(reason).replace("\n", " ")[:300]
