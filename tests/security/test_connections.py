"""Connections at the front, by raw bytes: none is held for nothing, none that is waited for is cut, and one source
cannot have them all.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from serving.cluster.haproxy import TOLD_SHARE, Timers
from tests.fronts import WAIT_S, Answer, Front, front, one, until, until_closed

pytestmark = pytest.mark.timeout(120)

CHUNKED = b"%b /%b HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
UNFINISHED = b"POST /%b HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\na"
WHOLE = b"POST /%b HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n{}"


@pytest.fixture(scope="module")
def patient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    """Its timers end nothing: what is closed is closed for another reason."""
    with front(tmp_path_factory.mktemp("patient")) as running:
        yield running


@pytest.fixture(scope="module")
def hasty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    timers = Timers(headers_s=1, keep_alive_s=1, client_s=1, half_closed_s=1)
    with front(tmp_path_factory.mktemp("hasty"), timers) as running:
        yield running


def error(answer: Answer) -> str:
    found = json.loads(answer.body)["error"]
    assert set(found) == {"message", "type", "param", "code"}
    assert answer.headers["content-type"] == "application/json"
    return str(found["code"])


@pytest.mark.parametrize(
    "request_", [CHUNKED % (b"GET", b"early"), UNFINISHED % b"early", CHUNKED % (b"POST", b"other") + b"5\r\nab"]
)
def test_an_answer_before_the_requests_end_closes_the_connection(patient: Front, request_: bytes) -> None:
    found = patient.ask(request_)
    assert found.status in {200, 401}
    assert found.headers["connection"] == "close"
    assert json.loads(found.body)
    assert "x-galerne-early" not in found.headers


def test_and_so_does_one_to_head_or_to_who_waits_for_100(patient: Front) -> None:
    assert patient.ask(CHUNKED % (b"HEAD", b"early")).status == 401
    waits = b"POST /early HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: 20\r\n\r\n"
    assert patient.ask(waits).status == 401


def test_a_client_that_goes_on_sending_is_not_listened_to(patient: Front) -> None:
    with patient.connect() as connection:
        connection.sendall(UNFINISHED % b"early")
        assert until_closed(connection).status == 401
        # The next bytes meet a closed socket; a server that listened would take megabytes.
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            connection.sendall(b"a" * 64 * 1024 * 1024)


def test_whoever_sent_all_keeps_the_connection_after_a_refusal(patient: Front) -> None:
    with patient.connect() as connection:
        for _ in range(3):
            connection.sendall(WHOLE % b"early")
            found = one(connection)
            assert found.status == 401
            assert "connection" not in found.headers


@pytest.mark.parametrize(
    "sent",
    [b"", b"GET /", UNFINISHED % b"body", b"GET /x HTTP/1.1\r\nhost: x\r\n\r\n"],
    ids=["nothing", "headers", "body", "idle"],
)
def test_every_silence_of_a_client_has_its_end(hasty: Front, sent: bytes) -> None:
    found = hasty.ask(sent)
    if found.status == 408:
        assert error(found) == "request_timeout"


@pytest.mark.parametrize("sent", [b"", b"GET /", UNFINISHED % b"body"], ids=["nothing", "headers", "body"])
def test_half_a_request_and_half_a_connection_are_nothing(patient: Front, sent: bytes) -> None:
    with patient.connect() as connection:
        connection.sendall(sent)
        connection.shutdown(socket.SHUT_WR)
        assert until_closed(connection).status in {0, 400}


@pytest.mark.parametrize("path", [b"late", b"stream"])
def test_an_answer_may_take_longer_than_any_silence(hasty: Front, path: bytes) -> None:
    with hasty.connect() as connection, hasty.connect() as silent:
        name = path + b"-long"
        connection.sendall(WHOLE % name)
        # Another client's silence is ended meanwhile, several times over.
        silent.sendall(b"GET /")
        until_closed(silent)
        for _ in range(2):
            hasty.ask(UNFINISHED % b"body")
        hasty.gateway.release(f"/{name.decode()}")
        end = b"last" if path == b"stream" else b"}"
        assert until(connection, end).startswith(b"HTTP/1.1 200 ")


def asked(connection: socket.socket) -> int:
    """A status; 0: closed without one."""
    try:
        connection.sendall(b"GET /x HTTP/1.1\r\nhost: x\r\n\r\n")
        if not connection.recv(1, socket.MSG_PEEK):
            return 0
    except (ConnectionResetError, BrokenPipeError):
        return 0
    return one(connection).status


def opened(running: Front, held: list[socket.socket], source: str = "127.0.0.1") -> int:
    """One more connection, and a request on it: its status, or 0 where it is closed unanswered."""
    try:
        held.append(running.connect(source))
    except ConnectionResetError:
        return 0
    return asked(held[-1])


def test_a_source_has_its_bound_and_others_their_room(tmp_path: Path) -> None:
    bound = 8
    told = bound // TOLD_SHARE
    with front(tmp_path, source_connections=bound, trusted=("127.0.0.3/32",)) as running, ExitStack() as stack:
        held: list[socket.socket] = []
        stack.callback(lambda: [connection.close() for connection in held])
        found = [opened(running, held) for _ in range(bound + told + 3)]
        assert found == [200] * bound + [429] * told + [0] * 3
        # Those that were there keep theirs, other sources have their own, and a proxy's are not counted.
        assert asked(held[0]) == 200
        assert {opened(running, held, "127.0.0.2") for _ in range(bound)} == {200}
        assert {opened(running, held, "127.0.0.3") for _ in range(3 * bound)} == {200}
        # The refusal says what to do.
        held[bound].sendall(LINE % b"")
        refused = until_closed(held[bound])
        assert (refused.status, error(refused)) == (429, "too_many_connections")
        assert int(refused.headers["retry-after"]) > 0


def test_silent_connections_count_as_well_and_room_that_is_left_is_had_again(tmp_path: Path) -> None:
    with front(tmp_path, source_connections=4) as running, ExitStack() as stack:
        silent = [stack.enter_context(running.connect()) for _ in range(5)]
        # HAProxy has taken all of them when it answers the last one.
        assert asked(silent[4]) == 429
        silent[0].close()
        silent[0] = stack.enter_context(running.connect("127.0.0.2"))
        while asked(silent[4]) != 200:
            pass


def test_within_its_bound_a_source_is_served_beside_its_own_silence(tmp_path: Path) -> None:
    bound = 40
    with front(tmp_path, source_connections=bound) as running, ExitStack() as stack:
        for _ in range(bound - 1):
            stack.enter_context(running.connect())
        assert {running.ask(LINE % b"").status for _ in range(20)} == {200}


LINE = b"GET /x HTTP/1.1\r\nhost: x\r\nconnection: close\r\n%b\r\n"


@pytest.mark.parametrize(
    ("sent", "status", "code"),
    [
        (b"GARBAGE\r\n\r\n", 400, "bad_request"),
        (b"GET /\r\n\r\n", 400, "bad_request"),
        (b"GET /a b HTTP/1.1\r\nhost: x\r\n\r\n", 400, "bad_request"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01", 400, "bad_request"),
        (b"POST /x HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n", 400, "bad_request"),
        (b"POST /x HTTP/1.1\r\nhost: x\r\ntransfer-encoding: odd\r\n\r\n", 400, "bad_request"),
        (LINE % b"no colon\r\n", 400, "bad_request"),
        (LINE % b"x-a: a\x00b\r\n", 400, "bad_request"),
        *[(LINE % b"x-a: a%cb\r\n" % byte, 400, "bad_request") for byte in (1, 8, 0x0B, 0x0C, 0x1B, 0x7F)],
        (LINE % (b"x-a: " + b"a" * 9000 + b"\r\n"), 431, "headers_too_large"),
        # More than HAProxy reads at all.
        (LINE % (b"x-a: " + b"a" * 70_000 + b"\r\n"), 400, "bad_request"),
        (LINE % b"".join(b"a%d: \r\n" % i for i in range(1500)), 431, "headers_too_large"),
        (LINE.replace(b"GET /x", b"OPTIONS *") % b"", 404, "not_found"),
        (LINE.replace(b"/x", b"*") % b"", 404, "not_found"),
        *[
            ((LINE % b"").replace(b"/x", path), 404, "not_found")
            for path in (b"/-/routes", b"/-/%72outes", b"/%2d/routes", b"/%2D%2Froutes", b"/-/Routes", b"/-/x")
        ],
        (b"POST /x HTTP/1.1\r\nhost: x\r\ncontent-length: 2000000\r\n\r\n", 413, "request_too_large"),
    ],
)
def test_what_is_refused_before_the_gateway_is_refused_in_its_words(
    patient: Front, sent: bytes, status: int, code: str
) -> None:
    found = patient.ask(sent)
    assert (found.status, error(found)) == (status, code)
    assert "browser" not in found.body.decode()


@pytest.mark.parametrize("header", [b"x-a: tab\there\r\n", b"x-a: \xc3\xa9\r\n", b"x-a:\r\n", b"x_a: 1\r\n"])
def test_odd_headers_that_are_valid_pass(patient: Front, header: bytes) -> None:
    assert patient.ask(LINE % header).status == 200


def test_streams_live_on_through_any_number_of_reloads(tmp_path: Path) -> None:
    with front(tmp_path) as running:
        streams = []
        for generation in range(4):
            stream = running.connect()
            stream.sendall(WHOLE % b"stream-%d" % generation)
            until(stream, b"first")
            streams.append(stream)
            running.start()
        *old, newest = running.processes
        assert all(process.poll() is None for process in running.processes)
        assert running.ask(LINE % b"").status == 200
        # The eldest stays the longest.
        for generation, stream in reversed(list(enumerate(streams))):
            assert old[generation].poll() is None
            running.gateway.release(f"/stream-{generation}")
            until(stream, b"last")
            stream.close()
            # With its last stream a process ends.
            assert old[generation].wait(WAIT_S) == 0
        assert newest.poll() is None


def test_a_replaced_process_does_not_stay_for_idle_connections(tmp_path: Path) -> None:
    with front(tmp_path, Timers(keep_alive_s=1)) as running:
        with running.connect() as idle:
            assert asked(idle) == 200
            running.start()
            assert running.processes[0].wait(WAIT_S) == 0
