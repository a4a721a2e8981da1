"""An upload, from the socket to the disk in one go: python-multipart finds the parts, bytes go where they stay.

Nothing waits in memory or beside its copy. An upload that is cut off, or refused, leaves nothing.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from common.errors import InvalidRequest
from common.files import Whole, new_id

MAX_PARTS, MAX_FIELD_BYTES = 9, 1024
PIECE_BYTES = 256 * 1024
"""Written at once, in a thread."""


class Incoming(Whole):
    """Bytes on their way to be a file of `folder`."""

    def __init__(self, folder: Path) -> None:
        self.id = new_id("file")
        super().__init__(folder / self.id)


class Form:
    """A form with one file and a few short fields, as its parts come."""

    def __init__(self, folder: Path) -> None:
        self.file = Incoming(folder)
        self.filename: str | None = None
        """None: no file has come in the field `file`."""
        self.whole = False
        """Its last boundary has come."""
        self.fields: dict[str, str] = {}
        self._parts = 0
        self._header, self._value = b"", b""
        self._headers: dict[bytes, bytes] = {}
        self._field: str | None = None
        self._text = b""
        self.callbacks = {
            "on_part_begin": self._on_part, "on_header_field": self._on_header,
            "on_header_value": self._on_value, "on_header_end": self._on_header_end,
            "on_headers_finished": self._on_headers, "on_part_data": self._on_data, "on_part_end": self._on_part_end,
            "on_end": self._on_end,
        }

    def _on_part(self) -> None:
        self._headers.clear()
        self._parts += 1
        if self._parts > MAX_PARTS:
            raise InvalidRequest(f"The form has more than {MAX_PARTS} parts.")

    def _on_header(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _on_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _on_header_end(self) -> None:
        self._headers[self._header.lower()] = self._value
        self._header = self._value = b""

    def _on_headers(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition"))
        name, filename = options.get(b"name", b"").decode(errors="replace"), options.get(b"filename")
        self._field, self._text = name, b""
        if filename is not None:
            if name != "file":
                raise InvalidRequest(f"{name[:80]!r}: the form's file stands in its field 'file'.", param=name[:80])
            if self.filename is not None:
                raise InvalidRequest("file: one file at a time.", param="file")
            self.filename, self._field = filename.decode(errors="replace"), None

    def _on_data(self, data: bytes, start: int, end: int) -> None:
        if self._field is None:
            self.file.write(data[start:end])
        elif len(self._text) + end - start > MAX_FIELD_BYTES:
            raise InvalidRequest(f"{self._field[:80]}: longer than {MAX_FIELD_BYTES} bytes.", param=self._field[:80])
        else:
            self._text += data[start:end]

    def _on_part_end(self) -> None:
        if self._field is not None:
            self.fields[self._field] = self._text.decode(errors="replace")

    def _on_end(self) -> None:
        self.whole = True


@contextlib.asynccontextmanager
async def received(request: Request, folder: Path) -> AsyncIterator[Form]:
    """A request's form, read to its end. What nobody has kept is gone afterwards. Raises InvalidRequest, OSError."""
    form = Form(folder)
    try:
        await _read(request, form)
        yield form
    except BaseException:
        await asyncio.shield(asyncio.to_thread(form.file.drop))
        raise


async def _read(request: Request, form: Form) -> None:
    kind, options = parse_options_header(request.headers.get("content-type"))
    if kind != b"multipart/form-data" or b"boundary" not in options:
        raise InvalidRequest("An upload is a form: Content-Type: multipart/form-data, with its boundary.")
    parser = MultipartParser(options[b"boundary"], form.callbacks)  # type: ignore[arg-type]  # a TypedDict of these
    waiting: list[bytes] = []
    try:
        async for chunk in request.stream():
            waiting.append(chunk)
            if sum(map(len, waiting)) >= PIECE_BYTES:
                piece, waiting = b"".join(waiting), []
                await asyncio.to_thread(parser.write, piece)
        await asyncio.to_thread(parser.write, b"".join(waiting))
    except FormParserError as error:
        raise InvalidRequest(f"The form cannot be read: {error}.") from error
    if not form.whole:
        raise InvalidRequest("The form ends before its last boundary.")
