"""An API server for tests: Kubernetes' REST API over real HTTP, in memory.

What the real one does and clients trip over is there: resource versions and compare-and-swap, lists in parts, watches with
bookmarks, time limits and forgotten history, merge patches, finalised deletion, evictions held by budgets, logs, the
service proxy, discovery, and RBAC, enforced from the very rules it is given. What it lacks: admission, defaulting, schema
validation, server-side apply. Faults are put before requests by `faults`; every request is recorded.
"""

from __future__ import annotations

import copy
import json
import ssl
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

Document = dict[str, Any]
KINDS = {
    "nodes": "Node",
    "namespaces": "Namespace",
    "pods": "Pod",
    "events": "Event",
    "services": "Service",
    "configmaps": "ConfigMap",
    "secrets": "Secret",
    "persistentvolumeclaims": "PersistentVolumeClaim",
    "resourcequotas": "ResourceQuota",
    "limitranges": "LimitRange",
    "deployments": "Deployment",
    "daemonsets": "DaemonSet",
    "storageclasses": "StorageClass",
    "networkpolicies": "NetworkPolicy",
    "ingressclasses": "IngressClass",
    "poddisruptionbudgets": "PodDisruptionBudget",
    "endpointslices": "EndpointSlice",
    "rayservices": "RayService",
    "rayclusters": "RayCluster",
    "jobs": "Job",
}


CORE = ("nodes", "namespaces", "pods", "events", "services", "configmaps", "secrets", "persistentvolumeclaims")
UNSCOPED = ("nodes", "namespaces", "storageclasses", "ingressclasses")


@dataclass(frozen=True, slots=True)
class Seen:
    """One request, in RBAC's words."""

    method: str
    verb: str
    group: str
    resource: str  # with its subresource, as RBAC writes it
    namespace: str
    name: str
    query: dict[str, str]
    body: Any
    authorization: str


@dataclass
class Fault:
    """An answer instead of the real one, `times` times; `status` 0 drops the connection, after `after_lines` of a watch."""

    matches: Callable[[Seen], bool]
    status: int = 0
    body: Document | bytes = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    times: int = 1
    after_lines: int | None = None


class ApiServer:
    """`with ApiServer() as server:`; objects are put in and read with `put` and `find`, as an administrator."""

    def __init__(self, port: int = 0, certificate: Path | None = None) -> None:
        """`certificate`: a PEM file with certificate and key, for HTTPS."""
        self.lock = threading.RLock()
        self.changed = threading.Condition(self.lock)
        self.version = 1000
        # (group, resource) -> (namespace, name) -> object
        self.objects: dict[tuple[str, str], dict[tuple[str, str], Document]] = {}
        # (version, group, resource, type, object): what watches replay.
        self.history: list[tuple[int, str, str, str, Document]] = []
        self.forgotten = 0
        self.seen: list[Seen] = []
        self.faults: list[Fault] = []
        self.token: str | None = None
        # None: everything is allowed. Else (group, resource, verb, namespace or None for every one).
        self.allowed: set[tuple[str, str, str, str | None]] | None = None
        self.discovery: dict[str, list[str]] = {}
        # HOST:PORT that it says of itself.
        self.advertised = "10.0.0.10:6443"
        self.logs: dict[tuple[str, str, bool], bytes] = {}
        self.git_version = "v1.34.2"
        self.page: int | None = None
        self.on_eviction: Callable[[Document], None] = lambda _: None
        self.on_write: Callable[[Seen], None] = lambda _: None
        self.proxy: dict[str, Callable[[str, dict[str, str]], bytes]] = {}
        self.errors: list[BaseException] = []
        self._http = _Http(("127.0.0.1", port), _handler(self))
        self._http.errors = self.errors
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self._http.socket = context.wrap_socket(self._http.socket, server_side=True)
        self._scheme = "http" if certificate is None else "https"
        self._http.daemon_threads = True
        self._http.block_on_close = False
        self.stopping = False
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self) -> ApiServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping = True
        with self.changed:
            self.changed.notify_all()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join(5)
        assert self.errors == [], "the server itself failed"

    @property
    def url(self) -> str:
        return f"{self._scheme}://127.0.0.1:{self._http.server_address[1]}"

    def allow(self, rules: Iterable[tuple[str, str, str, str | None]]) -> None:
        self.allowed = set(rules)

    def put(self, group: str, resource: str, document: Document) -> Document:
        """Create or replace, whatever the resource version."""
        with self.changed:
            metadata = document.setdefault("metadata", {})
            key = (metadata.get("namespace", ""), metadata["name"])
            old = self.objects.setdefault((group, resource), {}).get(key)
            metadata.setdefault("uid", old["metadata"]["uid"] if old else str(uuid.uuid4()))
            metadata.setdefault("creationTimestamp", "2026-11-20T08:00:00Z")
            document.setdefault("kind", KINDS.get(resource, resource))
            document.setdefault("apiVersion", f"{group}/v1" if group else "v1")
            generation = (old or {}).get("metadata", {}).get("generation", 0)
            metadata["generation"] = generation + (old is None or old.get("spec") != document.get("spec"))
            self._record(group, resource, "MODIFIED" if old else "ADDED", document)
            self.objects[group, resource][key] = document
            return copy.deepcopy(document)

    def change(self, group: str, resource: str, namespace: str, name: str, change: Callable[[Document], None]) -> None:
        with self.lock:
            document = self.find(group, resource, namespace, name)
            change(document)
            self.put(group, resource, document)

    def find(self, group: str, resource: str, namespace: str, name: str) -> Document:
        with self.lock:
            return copy.deepcopy(self.objects[group, resource][namespace, name])

    def delete(self, group: str, resource: str, namespace: str, name: str) -> None:
        with self.changed:
            document = self.objects[group, resource].pop((namespace, name))
            self._record(group, resource, "DELETED", document)

    def forget(self) -> None:
        """The history of watches is gone: older versions are answered 410."""
        with self.lock:
            self.forgotten = self.version
            self.history.clear()

    def _record(self, group: str, resource: str, kind: str, document: Document) -> None:
        self.version += 1
        document["metadata"]["resourceVersion"] = str(self.version)
        self.history.append((self.version, group, resource, kind, copy.deepcopy(document)))
        self.changed.notify_all()

    def permits(self, seen: Seen) -> bool:
        if self.allowed is None or not seen.resource:
            return True
        wanted = (seen.group, seen.resource, seen.verb)
        return (*wanted, seen.namespace or None) in self.allowed or (*wanted, None) in self.allowed


class _Http(ThreadingHTTPServer):
    """Clients that hang up are no error; what else goes wrong fails the test that it happened in."""

    errors: list[BaseException]

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exception()
        if error is not None and not isinstance(error, (ConnectionError, ssl.SSLError)):
            self.errors.append(error)


def _handler(server: ApiServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def log_message(self, *_: object) -> None: ...

        def do_GET(self) -> None:
            self._serve("GET")

        def do_POST(self) -> None:
            self._serve("POST")

        def do_PUT(self) -> None:
            self._serve("PUT")

        def do_PATCH(self) -> None:
            self._serve("PATCH")

        def do_DELETE(self) -> None:
            self._serve("DELETE")

        def _serve(self, method: str) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            raw = self.rfile.read(length) if length else b""
            try:
                seen = _understood(method, self.path, json.loads(raw) if raw else None, self.headers)
                with server.lock:
                    server.seen.append(seen)
                    fault = next((f for f in server.faults if f.times > 0 and f.matches(seen)), None)
                    if fault:
                        fault.times -= 1
                if fault and fault.after_lines is None:
                    self._fail(fault)
                elif server.token and self.headers.get("Authorization") != f"Bearer {server.token}":
                    self._status(401, "Unauthorized", "Unauthorized")
                elif not server.permits(seen):
                    self._status(
                        403, "Forbidden", f'{seen.resource} is forbidden: cannot {seen.verb} "{seen.resource}"'
                    )
                else:
                    self._answer(seen, fault)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True

        def _fail(self, fault: Fault) -> None:
            if fault.status == 0:
                self.close_connection = True
                self.connection.shutdown(2)
                return
            self._send(fault.status, fault.body, fault.headers)

        def _send(self, status: int, body: Document | bytes, headers: dict[str, str] | None = None) -> None:
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def _status(self, code: int, reason: str, message: str, **more: Any) -> None:
            headers = more.pop("headers", None)
            body = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "message": message}
            self._send(code, body | {"reason": reason, "code": code} | more, headers)

        def _answer(self, seen: Seen, fault: Fault | None) -> None:
            path = urlsplit(self.path).path
            if not seen.resource:
                self._discover(path)
            elif seen.resource == "pods/log":
                self._log(seen)
            elif seen.resource == "services/proxy":
                parts = path.split("/")
                tail = "/" + "/".join(parts[8:])
                handler = server.proxy.get(unquote(parts[6]))
                if handler is None:
                    self._status(503, "ServiceUnavailable", "no endpoints available for service")
                else:
                    self._send(200, handler(tail, seen.query))
            elif seen.resource == "pods/eviction":
                self._evict(seen)
            elif seen.verb == "watch":
                self._watch(seen, fault)
            elif seen.verb == "list":
                self._list(seen)
            else:
                self._object(seen)

        def _discover(self, path: str) -> None:
            if path == "/version":
                self._send(200, {"gitVersion": server.git_version})
            elif path == "/apis":
                groups = [
                    {"name": g, "versions": [{"groupVersion": f"{g}/{v}", "version": v} for v in sorted(versions)]}
                    for g, versions in _groups(server.discovery).items()
                ]
                self._send(200, {"kind": "APIGroupList", "groups": groups})
            elif path == "/api":
                addresses = (
                    [{"clientCIDR": "0.0.0.0/0", "serverAddress": server.advertised}] if server.advertised else []
                )
                self._send(200, {"kind": "APIVersions", "versions": ["v1"], "serverAddressByClientCIDRs": addresses})
            elif path == "/api/v1":
                self._send(200, _resources("v1", [n for n in KINDS if n in CORE]))
            elif path.removeprefix("/apis/") in server.discovery:
                group_version = path.removeprefix("/apis/")
                self._send(200, _resources(group_version, server.discovery[group_version]))
            else:
                self._status(404, "NotFound", "the server could not find the requested resource")

        def _log(self, seen: Seen) -> None:
            key = (seen.name, seen.query.get("container", ""), seen.query.get("previous") == "true")
            if key not in server.logs:
                kind = "previous terminated" if key[2] else "log of"
                self._status(400, "BadRequest", f'{kind} container "{key[1]}" in pod "{key[0]}" not found')
                return
            text = server.logs[key]
            if "tailLines" in seen.query:
                text = b"".join(text.splitlines(keepends=True)[-int(seen.query["tailLines"]) :])
            self._send(200, text[: int(seen.query.get("limitBytes") or len(text))])

        def _evict(self, seen: Seen) -> None:
            with server.lock:
                pod = server.objects.get(("", "pods"), {}).get((seen.namespace, seen.name))
                if pod is None:
                    self._status(404, "NotFound", f'pods "{seen.name}" not found')
                    return
                for budget in server.objects.get(("policy", "poddisruptionbudgets"), {}).values():
                    wanted = budget["spec"]["selector"]["matchLabels"]
                    if wanted.items() <= pod["metadata"].get("labels", {}).items():
                        if budget["status"]["disruptionsAllowed"] < 1:
                            cause = {"reason": "DisruptionBudget", "message": "The disruption budget needs more pods"}
                            message = "Cannot evict pod as it would violate the pod's disruption budget."
                            self._status(429, "TooManyRequests", message, details={"causes": [cause]})
                            return
                        if not (seen.body or {}).get("deleteOptions", {}).get("dryRun"):
                            budget["status"]["disruptionsAllowed"] -= 1
                pod = copy.deepcopy(pod)
            server.on_eviction(pod)
            self._send(201, {"kind": "Status", "status": "Success", "code": 201})

        def _selected(self, seen: Seen) -> list[Document]:
            found = server.objects.get((seen.group, seen.resource), {})
            return [
                copy.deepcopy(document)
                for (namespace, _), document in sorted(found.items())
                if seen.namespace in {"", namespace} and _matches(document, seen.query)
            ]

        def _list(self, seen: Seen) -> None:
            with server.lock:
                items, version = self._selected(seen), server.version
            size = server.page or int(seen.query.get("limit") or 0) or len(items) + 1
            start = int(seen.query.get("continue") or 0)
            metadata: Document = {"resourceVersion": str(version)}
            if start + size < len(items):
                metadata["continue"] = str(start + size)
            kind = KINDS.get(seen.resource, seen.resource)
            self._send(200, {"kind": f"{kind}List", "metadata": metadata, "items": items[start : start + size]})

        def _watch(self, seen: Seen, fault: Fault | None) -> None:
            ends = time.monotonic() + float(seen.query.get("timeoutSeconds") or 60)
            position = int(seen.query.get("resourceVersion") or 0)
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            lines = 0
            if position < server.forgotten:
                status = {"kind": "Status", "code": 410, "reason": "Expired", "message": "too old resource version"}
                self._line({"type": "ERROR", "object": status})
                self._end()
                return
            while not server.stopping:
                with server.changed:
                    waiting = [e for e in server.history if e[0] > position]
                    if not waiting and (left := ends - time.monotonic()) > 0:
                        server.changed.wait(left)
                        continue
                for version, group, resource, kind, document in waiting:
                    position = version
                    ours = (group, resource) == (seen.group, seen.resource)
                    here = seen.namespace in {"", document["metadata"].get("namespace", "")}
                    if ours and here and _matches(document, seen.query):
                        self._line({"type": kind, "object": document})
                        lines += 1
                        if fault and fault.after_lines is not None and lines >= fault.after_lines:
                            self.close_connection = True
                            self.connection.shutdown(2)
                            return
                if time.monotonic() >= ends:
                    break
            mark = {"kind": KINDS[seen.resource], "metadata": {"resourceVersion": str(position)}}
            if seen.query.get("allowWatchBookmarks") == "true":
                self._line({"type": "BOOKMARK", "object": mark})
            self._end()

        def _line(self, event: Document) -> None:
            line = json.dumps(event).encode() + b"\n"
            self.wfile.write(b"%x\r\n%s\r\n" % (len(line), line))
            self.wfile.flush()

        def _end(self) -> None:
            self.wfile.write(b"0\r\n\r\n")

        def _object(self, seen: Seen) -> None:
            with server.changed:
                stored = server.objects.setdefault((seen.group, seen.resource), {})
                if seen.verb == "create":
                    document = copy.deepcopy(seen.body)
                    document["metadata"]["namespace"] = seen.namespace
                    if (seen.namespace, document["metadata"]["name"]) in stored:
                        self._status(409, "AlreadyExists", f'"{document["metadata"]["name"]}" already exists')
                        return
                    self._send(201, server.put(seen.group, seen.resource, document))
                    server.on_write(seen)
                    return
                key = ("" if seen.resource == "namespaces" else seen.namespace, seen.name)
                old = stored.get(key)
                if old is None:
                    self._status(404, "NotFound", f'{seen.resource} "{seen.name}" not found')
                    return
                if seen.verb == "get":
                    self._send(200, old)
                    return
                body = copy.deepcopy(seen.body)
                sent = ((body or {}).get("metadata") or {}).get("resourceVersion")
                if sent and sent != old["metadata"]["resourceVersion"]:
                    message = "the object has been modified; please apply your changes to the latest version"
                    self._status(409, "Conflict", message)
                    return
                new = body if seen.verb == "update" else _merged(old, body)
                if seen.verb == "update" and "status" in old:
                    new["status"] = old["status"]  # a subresource: writes to the object leave it alone
                # As the real one: what was asked to go goes with its last finalizer, and the moment is nobody's to change.
                if asked := old["metadata"].get("deletionTimestamp"):
                    new["metadata"]["deletionTimestamp"] = asked
                answer = server.put(seen.group, seen.resource, new)
                if asked and not new["metadata"].get("finalizers"):
                    server.delete(seen.group, seen.resource, *key)
                self._send(200, answer)
            server.on_write(seen)

    return Handler


def _resources(group_version: str, names: Iterable[str]) -> Document:
    rows = [
        {
            "name": name,
            "singularName": "",
            "kind": KINDS.get(name, name),
            "namespaced": name not in UNSCOPED,
            "verbs": ["create", "delete", "get", "list", "patch", "update", "watch"],
        }
        for name in names
    ]
    if "pods" in names:
        eviction = {
            "name": "pods/eviction",
            "singularName": "",
            "namespaced": True,
            "kind": "Eviction",
            "verbs": ["create"],
        }
        rows.append(eviction | {"group": "policy", "version": "v1"})
    return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": group_version, "resources": rows}


def _groups(discovery: dict[str, list[str]]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for group_version in discovery:
        group, _, version = group_version.rpartition("/")
        found.setdefault(group, set()).add(version)
    return found


def _understood(method: str, target: str, body: Any, headers: Any) -> Seen:
    split = urlsplit(target)
    query = {name: values[-1] for name, values in parse_qs(split.query).items()}
    parts = [unquote(part) for part in split.path.strip("/").split("/")]
    authorization = headers.get("Authorization") or ""
    group, rest = ("", parts[2:]) if parts[0] == "api" else (parts[1] if len(parts) > 1 else "", parts[3:])
    # RBAC takes a namespace's own name for its namespace.
    namespace = rest[1] if len(rest) == 2 and rest[0] == "namespaces" else ""
    if len(rest) > 2 and rest[0] == "namespaces":
        namespace, rest = rest[1], rest[2:]
    if not rest:
        return Seen(method, "get", group, "", "", "", query, body, authorization)
    resource, name = rest[0], rest[1] if len(rest) > 1 else ""
    if len(rest) > 2:
        resource = f"{resource}/{rest[2]}"
    verb = {"POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}.get(method, "get")
    if method == "GET" and not name:
        verb = "watch" if query.get("watch") == "true" else "list"
    return Seen(method, verb, group, resource, namespace, name, query, body, authorization)


def _matches(document: Document, query: dict[str, str]) -> bool:
    labels = document["metadata"].get("labels") or {}
    for term in filter(None, (query.get("labelSelector") or "").split(",")):
        name, _, value = term.partition("=")
        if name not in labels or (value and labels[name] != value):
            return False
    for term in filter(None, (query.get("fieldSelector") or "").split(",")):
        path, _, value = term.partition("=")
        found: Any = document
        for step in path.split("."):
            found = (found or {}).get(step)
        if str(found or "") != value:
            return False
    return True


def _merged(old: Any, patch: Any) -> Any:
    """RFC 7396."""
    if not isinstance(patch, dict):
        return copy.deepcopy(patch)
    result = copy.deepcopy(old) if isinstance(old, dict) else {}
    for name, value in patch.items():
        if value is None:
            result.pop(name, None)
        else:
            result[name] = _merged(result.get(name), value)
    return result
