"""An upload's way from the socket to the disk: once, in pieces, all of it or nothing."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi import FastAPI, Request
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import ApiError
from common.problems import answer_api_error
from services.jobs.upload import received


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


def client(folder: Path, seen: list) -> TestClient:
    api = FastAPI()
    api.add_exception_handler(ApiError, answer_api_error)

    @api.post("/")
    async def upload(request: Request) -> dict:
        async with received(request, folder) as form:
            seen.append(sorted(path.suffix for path in folder.iterdir()))
            form.file.keep()
        return {"fields": form.fields, "name": form.filename, "id": form.file.id, "bytes": form.file.bytes}

    return TestClient(api)


HEADERS = {"content-type": "multipart/form-data; boundary=b"}


def part(name: str, data: bytes, filename: str | None = None) -> bytes:
    disposition = f'form-data; name="{name}"' + (f'; filename="{filename}"' if filename is not None else "")
    return f"--b\r\nContent-Disposition: {disposition}\r\n\r\n".encode() + data + b"\r\n"


@settings(max_examples=60, deadline=None)
@given(data=st.binary(max_size=600_000), cuts=st.lists(st.integers(0, 600_300), max_size=6), first=st.booleans())
def test_whatever_it_is_cut_into(tmp_path_factory: pytest.TempPathFactory, data: bytes, cuts: list[int], first: bool) -> None:
    if b"\r\n--b" in data:
        return
    folder, seen = tmp_path_factory.mktemp("up"), []
    parts = [part("purpose", b"batch"), part("file", data, "a.jsonl")]
    body = b"".join(parts if first else parts[::-1]) + b"--b--\r\n"

    def pieces() -> Iterator[bytes]:
        edges = [0, *sorted(c for c in cuts if c < len(body)), len(body)]
        for start, end in zip(edges, edges[1:], strict=False):
            yield body[start:end]

    said = client(folder, seen).post("/", content=pieces(), headers=HEADERS).json()
    assert (said["fields"], said["name"], said["bytes"]) == ({"purpose": "batch"}, "a.jsonl", len(data))
    assert (folder / said["id"]).read_bytes() == data
    assert os.listdir(folder) == [said["id"]]
    assert seen == [[".partial"] if data else []], "one copy"


@pytest.mark.parametrize(("body", "said"), [
    (part("file", b"x" * 10, "a"), "last boundary"),
    (part("file", b"x", "a") + part("file", b"y", "b") + b"--b--\r\n", "one file"),
    (part("other", b"x", "a") + b"--b--\r\n", "field 'file'"),
    (part("file", b"x", "a") + part("purpose", b"x" * 2000) + b"--b--\r\n", "longer than"),
    (part("file", b"x", "a") + b"".join(part(f"f{n}", b"x") for n in range(20)) + b"--b--\r\n", "more than 9 parts"),
    (part("file", b"x", "a") + part("purpose", b"batch") * 20 + b"--b--\r\n", "more than 9 parts"),
    (b"nonsense", "cannot be read"),
    (b"", "last boundary"),
])
def test_what_is_refused_leaves_nothing(folder: Path, body: bytes, said: str) -> None:
    answer = client(folder, []).post("/", content=body, headers=HEADERS)
    assert answer.status_code == 400
    assert said in answer.json()["error"]["message"]
    assert os.listdir(folder) == []


@pytest.mark.parametrize("kind", ["application/json", "multipart/form-data", ""])
def test_what_is_no_form_is_said(folder: Path, kind: str) -> None:
    answer = client(folder, []).post("/", content=b"{}", headers={"content-type": kind})
    assert answer.status_code == 400
    assert "multipart/form-data" in answer.json()["error"]["message"]
