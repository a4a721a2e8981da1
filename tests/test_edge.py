"""The gateway's own HTTP edge, spoken to as nginx does, and as nginx never would: over its socket, byte by byte."""

import asyncio
import concurrent.futures
import contextlib
import json
import signal
import socket
import time
from collections.abc import Iterator

import httpx
import pytest

from common.metering import context
from tests.harness import Stack, body, running, wait_for

CHAT = "/v1/chat/completions"


@contextlib.contextmanager
def connection(stack: Stack) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(5)
        sock.connect(str(stack.dials.gateway_socket))
        yield sock


def request(stack: Stack, raw: bytes = b"", key: str = "", path: str = CHAT, headers: str = "", **fields: object) -> bytes:
    raw = raw or json.dumps(body("say 3", **fields)).encode()
    return (f"POST {path} HTTP/1.1\r\nHost: gateway\r\nAuthorization: Bearer {key or stack.key}\r\n"
            f"Content-Length: {len(raw)}\r\n{headers}\r\n").encode() + raw


def answers(sock: socket.socket, count: int) -> list[tuple[int, dict[str, str], bytes]]:
    """The next responses on a connection."""
    found, data = [], b""
    while len(found) < count:
        head, sep, rest = data.partition(b"\r\n\r\n")
        lines = head.decode().split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines[1:] if ": " in line)
        length = int(headers.get("content-length", 0))
        if sep and len(rest) >= length:
            found.append((int(lines[0].split()[1]), headers, rest[:length]))
            data = rest[length:]
            continue
        part = sock.recv(65536)
        assert part, f"cut after {found} {data!r}"
        data += part
    return found


def test_nginx_is_told_a_worker(shared: Stack) -> None:
    with connection(shared) as sock:
        for _ in range(3):  # the connection is kept
            sock.sendall(request(shared))
            [(status, headers, _)] = answers(sock, 1)
            assert (status, headers["x-accel-redirect"]) == (200, "@worker")
            assert context.decode(headers["x-owngpt-context"].encode()) is not None


def test_any_split_into_packets_is_the_same(shared: Stack) -> None:
    raw = request(shared)
    with connection(shared) as sock:
        for size in (1, 7, 50):
            for at in range(0, len(raw), size):
                sock.sendall(raw[at : at + size])
            assert answers(sock, 1)[0][0] == 200


def test_pipelined_requests_are_answered_in_their_order(shared: Stack) -> None:
    """Hot ones, ones that must wait for redis, and other routes, all on one connection."""
    models = f"GET /v1/models HTTP/1.1\r\nHost: gateway\r\nAuthorization: Bearer {shared.key}\r\n\r\n".encode()
    with connection(shared) as sock:
        sock.sendall(request(shared) + request(shared, temperature=0, seed=7) + models + request(shared, raw=b"{}") + request(shared))
        found = answers(sock, 5)
    assert [status for status, _, _ in found] == [200, 200, 200, 400, 200]
    assert ["x-accel-redirect" in headers for _, headers, _ in found] == [True, True, False, False, True]


def test_errors_are_answered_at_once_and_keep_the_connection(shared: Stack) -> None:
    with connection(shared) as sock:
        sock.sendall(request(shared, key="no") + request(shared, raw=b"{") + request(shared))
        assert [status for status, _, _ in answers(sock, 3)] == [401, 400, 200]


def test_a_body_over_the_limit_is_a_413(shared: Stack) -> None:
    with connection(shared) as sock:
        head = request(shared, raw=b"x" * 5_000_000)
        with contextlib.suppress(ConnectionError):
            sock.sendall(head)
        assert answers(sock, 1)[0][0] == 413
    with connection(shared) as sock:  # chunked, so that nobody says beforehand how much it is
        sock.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {shared.key}\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
        with contextlib.suppress(ConnectionError):
            for _ in range(50):
                sock.sendall(b"186a0\r\n" + b"x" * 100_000 + b"\r\n")
            sock.sendall(b"0\r\n\r\n")
        assert answers(sock, 1)[0][0] == 413


def test_expect_continue_and_other_methods_take_uvicorns_way(shared: Stack) -> None:
    with connection(shared) as sock:
        raw = json.dumps(body("say 3")).encode()
        head = request(shared, raw=raw, headers="Expect: 100-continue\r\n")[: -len(raw)]
        sock.sendall(head)
        assert sock.recv(100).startswith(b"HTTP/1.1 100")
        sock.sendall(raw)
        assert answers(sock, 1)[0][0] == 200
        sock.sendall(f"GET {CHAT} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        assert answers(sock, 1)[0][0] == 405
        sock.sendall(request(shared, headers="Connection: close\r\n"))
        assert answers(sock, 1)[0][0] == 200
        assert sock.recv(1) == b""


def test_what_is_no_http_and_clients_that_leave_harm_nobody(shared: Stack) -> None:
    for junk in (b"\0\1\2\r\n\r\n", b"POST", request(shared)[:-5], b"POST " + CHAT.encode() + b" HTTP/1.1\r\nContent-Length: 9\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n{}"):
        with connection(shared) as sock:
            sock.sendall(junk)
    with connection(shared) as sock:
        sock.sendall(request(shared))
        assert answers(sock, 1)[0][0] == 200
    assert not [line for line in shared.log("gateway") if line["level"] == "error"]


def test_a_client_that_leaves_in_the_middle_of_its_body_is_no_fault(shared: Stack) -> None:
    raw = request(shared, raw=b"{" + b" " * 200_000 + b"}")
    for where in ("socket", "port"):
        with socket.socket(socket.AF_UNIX if where == "socket" else socket.AF_INET) as sock:
            sock.connect(str(shared.dials.gateway_socket) if where == "socket" else ("127.0.0.1", shared.gateway_port))
            sock.sendall(raw[:100_000])
            time.sleep(0.1)
    time.sleep(0.2)
    assert not [line for line in shared.log("gateway") if line["level"] == "error"]


def test_over_tcp_nobody_is_taken_for_nginx(shared: Stack) -> None:
    """Any process that reaches the port could tell of failed attempts, or bring a context; it is relayed and believed nothing."""
    forged = context.encode(context.Context("uid", "theirs", "somebody", 3)).decode()
    answer = httpx.post(f"http://127.0.0.1:{shared.gateway_port}{CHAT}", json=body("say 3"), headers={
        "authorization": f"Bearer {shared.key}", "x-owngpt-context": forged, "x-failed-worker": "127.0.0.1:1",
        "x-failed-sent": "1 : 9 : 1 : 9", "x-failed-status": "200 : 502 : 200 : 502", "x-request-id": "mine-0001"})
    assert answer.status_code == 200
    assert answer.json()["usage"]["completion_tokens"] == 3
    assert answer.headers["x-request-id"] == "mine-0001"


def test_whoever_leaves_while_waiting_is_forgotten(shared: Stack) -> None:
    """Followers that time out stayed, and were promoted one after the other when the first failed."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool, shared.client() as client:
        first = pool.submit(lambda: client.post(CHAT, json=body("slow 2 leaving", temperature=0)))
        time.sleep(0.2)
        gone = []
        for _ in range(10):
            sock = socket.socket(socket.AF_UNIX)
            sock.connect(str(shared.dials.gateway_socket))
            sock.sendall(request(shared, raw=json.dumps(body("slow 2 leaving", temperature=0)).encode()))
            gone.append(sock)
        time.sleep(0.3)
        for sock in gone:
            sock.close()
        assert first.result().headers["x-owngpt-cache"] == "miss"
        time.sleep(0.3)
    records = [r for r in shared.records() if r["worker"] == "answer-cache"]
    assert not [r for r in records if r["started_at"] > time.time() - 3], "no decision was made for those who left"


def test_shutdown_finishes_what_has_begun(tmp_path) -> None:
    with running(tmp_path) as stack:
        stack.add_worker("w1")
        raw = request(stack)
        with connection(stack) as sock:
            sock.sendall(raw[:-10])
            time.sleep(0.2)
            stack.running["gateway"].send_signal(signal.SIGTERM)
            time.sleep(0.3)
            sock.sendall(raw[-10:])
            assert answers(sock, 1)[0][0] == 200
            assert sock.recv(1) == b""
        wait_for(lambda: stack.running["gateway"].poll() is not None, "gone")
        assert stack.running["gateway"].returncode in (0, -signal.SIGTERM)


def test_shutdown_waits_for_a_decision_that_waits(tmp_path) -> None:
    with running(tmp_path) as stack:
        stack.add_worker("w1")
        with connection(stack) as sock:
            sock.sendall(request(stack))  # the key is known from here on
            answers(sock, 1)
            stack.running["redis-cache"].send_signal(signal.SIGSTOP)
            sock.sendall(request(stack, temperature=0))
            time.sleep(0.05)
            stack.running["gateway"].send_signal(signal.SIGTERM)
            [(status, headers, _)] = answers(sock, 1)
            assert (status, headers["x-accel-redirect"]) == (200, "@worker")
            assert sock.recv(1) == b""
        stack.running["redis-cache"].send_signal(signal.SIGCONT)
        wait_for(lambda: stack.running["gateway"].poll() is not None, "gone")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_idle_gateway_stops_at_once(tmp_path, number: int) -> None:
    with running(tmp_path) as stack:
        began = time.monotonic()
        stack.running["gateway"].send_signal(number)
        stack.running["gateway"].wait(5)
        assert time.monotonic() - began < 3


def test_many_at_once_over_few_connections(shared: Stack) -> None:
    async def ask() -> list[int]:
        transport = httpx.AsyncHTTPTransport(uds=str(shared.dials.gateway_socket), limits=httpx.Limits(max_connections=8))
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway", timeout=20,
                                     headers={"authorization": f"Bearer {shared.key}"}) as client:
            async def one(n: int) -> int:
                return (await client.post(CHAT, json=body("say 3", **({"temperature": 0, "seed": n} if n % 2 else {})))).status_code
            return await asyncio.gather(*(one(n) for n in range(200)))

    assert asyncio.run(ask()) == [200] * 200
