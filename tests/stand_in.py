"""A proxy that answers as whatever host it is asked for, over TLS: what a program asks of which host is seen, and nothing
leaves the machine.

The program is told of it with HTTPS_PROXY and of its certificates with SSL_CERT_FILE.
"""

from __future__ import annotations

import datetime
import socketserver
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

# Path -> body; None: 404.
Answers = Callable[[str], "bytes | None"]


@dataclass
class StandIn:
    """Where it listens, what its certificates are signed with, and (host, path) of every request."""

    proxy: str
    bundle: Path
    asked: list[tuple[str, str]] = field(default_factory=list)


@contextmanager
def stand_in(directory: Path, answers: Answers) -> Iterator[StandIn]:
    """Answer every host's GET requests by `answers`."""
    authority = _Authority(directory)
    told = StandIn("", directory / "bundle.pem")

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            verb, target, _ = self._head()
            assert verb == "CONNECT"
            self.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
            host = target.partition(":")[0]
            with authority.context(host).wrap_socket(self.connection, server_side=True) as inner:
                self.rfile, self.wfile = inner.makefile("rb"), inner.makefile("wb")
                while (words := self._head())[0]:
                    told.asked.append((host, words[1]))
                    body = answers(words[1])
                    status = "404 Not Found" if body is None else "200 OK"
                    kind = "text/html" if words[1].endswith("/") else "application/octet-stream"
                    head = f"HTTP/1.1 {status}\r\ncontent-type: {kind}\r\ncontent-length: {len(body or b'')}\r\n\r\n"
                    self.wfile.write(head.encode() + (body or b""))
                    self.wfile.flush()

        def _head(self) -> list[str]:
            first = self.rfile.readline().decode().split()
            while self.rfile.readline().strip():
                pass
            return first or ["", "", ""]

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True

        def handle_error(self, request: object, client_address: object) -> None:
            """A client that goes away is no error of this server's."""

    with Server(("127.0.0.1", 0), Handler) as server:
        told.proxy = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield told
        finally:
            server.shutdown()
            thread.join()


class _Authority:
    """Signs a certificate for every host."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "stand-in")])
        self._contexts: dict[str, ssl.SSLContext] = {}
        self._lock = threading.Lock()
        (directory / "bundle.pem").write_bytes(_pem(self._signed(self._key, self._name, None)))

    def context(self, host: str) -> ssl.SSLContext:
        with self._lock:
            if host not in self._contexts:
                key = ec.generate_private_key(ec.SECP256R1())
                name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host)])
                file = self._directory / f"host-{len(self._contexts)}.pem"
                private = key.private_bytes(
                    serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
                )
                file.write_bytes(_pem(self._signed(key, name, host)) + private)
                self._contexts[host] = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
                self._contexts[host].load_cert_chain(file)
            return self._contexts[host]

    def _signed(self, key: ec.EllipticCurvePrivateKey, name: x509.Name, host: str | None) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        built = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=host is None, path_length=None), critical=True)
        )
        if host is not None:
            built = built.add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), critical=False)
        return built.sign(self._key, hashes.SHA256())


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)
