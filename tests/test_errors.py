"""Bad input and missing things, through real nginx: the right status, type, code and field; never a 500."""

import contextlib
import json
import socket
import time

import httpx
import pytest

from common.routes import ROUTES
from tests.harness import Stack, body

CHAT = "/v1/chat/completions"


def error(response: httpx.Response) -> dict:
    document = response.json()["error"]
    assert set(document) == {"message", "type", "param", "code"}
    return document


def test_no_key_and_bad_keys_get_the_same_401(shared: Stack) -> None:
    texts = set()
    for headers in ({}, {"authorization": "Bearer nonsense"}, {"authorization": "Basic eDp5"},
                    {"authorization": "Bearer " + shared.key[:-1] + ("1" if shared.key[-1] == "0" else "0")}, {"x-api-key": "x"}):
        response = httpx.post(shared.base + CHAT, json=body("say 1"), headers=headers)
        assert response.status_code == 401
        assert error(response)["code"] == "invalid_api_key"
        texts.add(response.text)
    assert len(texts) == 1


def test_a_well_formed_key_that_was_never_made_is_refused(shared: Stack) -> None:
    from common.keys import make

    other, _ = make("nobody")
    assert httpx.post(shared.base + CHAT, json=body("say 1"), headers={"authorization": f"Bearer {other}"}).status_code == 401


def test_anthropic_style_key_header_works(shared: Stack) -> None:
    response = httpx.post(shared.base + "/v1/messages", json=body("say 1", max_tokens=5), headers={"x-api-key": shared.key})
    assert response.status_code == 200


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens"])
def test_anthropics_clients_get_errors_in_their_shape(shared: Stack, path: str) -> None:
    """Ours, an engine's, and what is refused before anybody reads it (C7)."""
    key = {"x-api-key": shared.key}
    for fields, headers, status, kind in (
        ({}, {}, 401, "authentication_error"),
        ({"model": "none"}, key, 404, "not_found_error"),
        ({"max_tokens": "ten"}, key, 400, "invalid_request_error"),
        ({"messages": [{"role": "user", "content": "status 400"}]}, key, 400, "invalid_request_error"),
        ({"messages": [{"role": "user", "content": "status 501"}]}, key, 501, "api_error"),
    ):
        answer = httpx.post(shared.base + path, json={**body("say 1", max_tokens=5), **fields}, headers=headers)
        said = answer.json()
        assert (answer.status_code, said["type"], said["error"]["type"]) == (status, "error", kind), answer.text
        assert said["error"].keys() == {"type", "message"}
    too_much = httpx.post(f"http://127.0.0.1:{shared.gateway_port}{path}", content=b"x" * 5_000_000, headers=key)
    assert (too_much.status_code, too_much.json()["error"]["type"]) == (413, "request_too_large")


@pytest.mark.parametrize(("fields", "param"), [
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"max_tokens": 10**30}, "max_tokens"),
    ({"max_tokens": "ten"}, "max_tokens"),
    ({"n": 0}, "n"),
    ({"n": 10_000}, "n"),
    ({"temperature": -0.1}, "temperature"),
    ({"top_p": 2}, "top_p"),
    ({"stream": "yes"}, "stream"),
    ({"messages": "hello"}, "messages"),
    ({"model": 7}, "model"),
    ({"chat_template": "{{ 7*7 }}"}, "chat_template"),
])
def test_wrong_fields_are_named(shared: Stack, fields: dict, param: str) -> None:
    response = shared.chat("say 1", **fields)
    assert response.status_code == 400
    assert error(response)["param"] == param
    assert error(response)["type"] == "invalid_request_error"


@pytest.mark.parametrize("raw", [
    b"", b"{", b"[]", b'"x"', b"null", b'{"model": "fake", "messages": [', b"\xff\xfe{}",
    b'{"model":"fake","messages":[{"role":"user","content":"\xc3\x28"}]}', b"[" * 200_000, b'{"a":' * 50_000,
    b'{"model":"fake"}', b'{"messages":[]}',
])
def test_broken_bodies_are_a_400(shared: Stack, raw: bytes) -> None:
    with shared.client() as client:
        response = client.post(CHAT, content=raw, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert error(response)["message"]


def test_unknown_model_is_a_404_that_names_what_there_is(shared: Stack) -> None:
    response = shared.chat("say 1", model="gpt-9")
    assert response.status_code == 404
    assert error(response)["code"] == "model_not_found"
    assert "fake" in error(response)["message"]


def test_unknown_fields_pass_through(shared: Stack) -> None:
    assert shared.chat("say 1", some_future_field={"deep": [1, 2]}).status_code == 200


def test_ten_megabytes_are_a_413(shared: Stack) -> None:
    response = shared.chat("x" * 10_000_000)
    assert response.status_code == 413
    assert error(response)["code"] == "body_too_large"


def test_wrong_method_and_unknown_paths(shared: Stack) -> None:
    with shared.client() as client:
        assert client.get(CHAT).status_code == 405
        assert error(client.delete(CHAT))["code"] == "method_not_allowed"
        for path in ("/metrics", "/pause", "/invocations", "/v1/load_lora_adapter", "/owngpt/load", "/docs",
                     "/v1/chat/completions/../../../metrics", "/v1/models/../../metrics", "//metrics", "/health/x", "/assets/../metrics", "/assets/none.js"):
            response = client.get(httpx.URL(shared.base).copy_with(raw_path=path.encode()))
            assert response.status_code == 404, path
            assert error(response)["type"] == "invalid_request_error"


def test_nginx_lets_out_exactly_the_gateways_routes() -> None:
    from services.local.plan import ROOT

    text = (ROOT / "nginx/nginx.conf.template").read_text()
    block = text.split("map $uri $public {")[1].split("}")[0]
    listed = {line.split()[0] for line in block.splitlines() if line.strip().startswith("/")}
    assert listed == set(ROUTES) | {"/v1/models", "/health", "/ready"}


def test_models(shared: Stack) -> None:
    with shared.client() as client:
        assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["fake"]
        assert client.get("/v1/models/fake").json()["object"] == "model"
        missing = client.get("/v1/models/none/such")
    assert missing.status_code == 404
    assert error(missing)["code"] == "model_not_found"
    assert httpx.get(shared.base + "/v1/models").status_code == 401


def test_no_worker_is_a_503_with_retry_after(stack: Stack) -> None:
    response = stack.chat("say 1")
    assert response.status_code == 503
    assert response.headers["retry-after"] == "2"
    assert error(response)["code"] == "no_worker_ready"
    ready = httpx.get(stack.base + "/ready")
    assert ready.status_code == 503
    assert httpx.get(stack.base + "/health").status_code == 200


def test_clients_cannot_steer_with_internal_headers(shared: Stack) -> None:
    evil = {"x-failed-worker": "127.0.0.1:1", "x-failed-sent": "1 : 99 : 1 : 99", "x-failed-status": "200 : 502 : 200 : 502",
            "x-worker": "127.0.0.1:1", "x-accel-redirect": "/health", "x-owngpt-owner": "owngpt",
            "x-owngpt-context": '{"uid":"u","request_id":"r","key":"owngpt","batch":true}', "x-vllm-priority": "-5"}
    with shared.client() as client:
        seen = client.post(CHAT, json=body("echo headers"), headers=evil).json()
    record = shared.records()[-1]
    assert (record["key"], record["attempt"], record["batch"]) == (shared.record.id, 1, False)
    assert "x-owngpt-context" not in seen
    assert "x-failed-worker" not in seen
    assert "x-accel-redirect" not in seen
    assert "x-vllm-priority" not in seen
    assert shared.key not in str(seen)


def test_a_worker_cannot_steer_nginx(shared: Stack) -> None:
    response = shared.chat("accel")
    assert response.json() == {"choices": []}


def test_engine_errors_are_told_in_our_words(shared: Stack) -> None:
    refused = shared.chat("status 400")
    assert refused.status_code == 400
    assert error(refused)["type"] == "invalid_request_error"
    assert error(refused)["param"] == "seed"
    failed = shared.chat("status 500")
    assert failed.status_code == 502
    assert "secret" not in failed.text
    assert failed.headers["x-should-retry"] == "false"


def test_request_ids_travel(shared: Stack) -> None:
    with shared.client() as client:
        ours = client.post(CHAT, json=body("echo"), headers={"x-request-id": "my-request-0001"})
        assert ours.headers["x-request-id"] == ours.json()["x-request-id"] == "my-request-0001"
        odd = client.post(CHAT, json=body("echo"), headers={"x-request-id": 'x"{evil'})
        assert odd.headers["x-request-id"] == odd.json()["x-request-id"] != 'x"{evil'
        bad = client.post(CHAT, content=b"{", headers={"x-request-id": "my-request-0002"})
        assert bad.headers["x-request-id"] == "my-request-0002"


def raw_exchange(stack: Stack, data: bytes, wait_s: float = 3.0) -> bytes:
    with socket.create_connection(("127.0.0.1", stack.port), timeout=wait_s) as connection:
        connection.sendall(data)
        received = b""
        with contextlib.suppress(TimeoutError, ConnectionError):
            while part := connection.recv(65536):
                received += part
        return received


@pytest.mark.parametrize("request_", [
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nX-A: a\nb: c\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer a\0b\r\n\r\n",
    b"GET / HTTP/9.9\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00",
])
def test_smuggled_or_broken_http_is_refused(shared: Stack, request_: bytes) -> None:
    status = raw_exchange(shared, request_).split(b"\r\n")[0]
    assert b" 40" in status or b" 505" in status or b" 501" in status or status == b"" or status.startswith(b"<html>"), status


def test_a_half_closed_client_still_gets_its_answer_or_a_cut(shared: Stack) -> None:
    payload = json.dumps(body("say 2")).encode()
    head = (f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {shared.key}\r\n"
            f"Content-Length: {len(payload)}\r\nConnection: close\r\n\r\n").encode()
    with socket.create_connection(("127.0.0.1", shared.port), timeout=5) as connection:
        connection.sendall(head + payload)
        connection.shutdown(socket.SHUT_WR)
        answer = connection.recv(65536)
    assert answer == b"" or b" 200 " in answer.split(b"\r\n")[0]


def test_slow_loris_is_cut_and_others_are_served(shared: Stack) -> None:
    slow = [socket.create_connection(("127.0.0.1", shared.port)) for _ in range(200)]
    for connection in slow:
        connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nX-")
    assert shared.chat("say 1").status_code == 200
    deadline = time.monotonic() + 16
    open_ = set(slow)
    while open_ and time.monotonic() < deadline:
        for connection in list(open_):
            connection.setblocking(False)
            try:
                if connection.recv(4096) == b"":
                    open_.discard(connection)
            except BlockingIOError:
                pass
            except ConnectionError:
                open_.discard(connection)
        time.sleep(0.1)
    assert not open_
    for connection in slow:
        connection.close()
