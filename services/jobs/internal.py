"""The routes for trainers. nginx does not let anybody in here; who is in must show the trainer's token."""

from hmac import compare_digest
from typing import TypeVar

import msgspec
from fastapi import FastAPI, Request, Response

from common import errors
from common.tuning import End, Report, Wanted
from services.jobs.trainers import Trainers

Kind = TypeVar("Kind")


def add_internal(api: FastAPI, trainer_token: str) -> None:
    """/internal/tuning."""
    expected = f"Bearer {trainer_token}".encode()

    async def read(request: Request, kind: type[Kind]) -> tuple[Trainers, Kind]:
        if not compare_digest(request.headers.get("authorization", "").encode("latin-1"), expected):
            raise errors.Unauthorized
        try:
            return request.app.state.trainers, msgspec.json.decode(await request.body(), type=kind)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise errors.InvalidRequest(str(error)) from None

    @api.post("/internal/tuning/lease")
    async def lease(request: Request) -> Response:
        trainers, wanted = await read(request, Wanted)
        found = await trainers.lease(wanted.model)
        return Response(status_code=204) if found is None else said(found)

    @api.post("/internal/tuning/jobs/{job_id}")
    async def report(request: Request, job_id: str) -> Response:
        trainers, given = await read(request, Report)
        return said(await trainers.report(job_id, given))

    @api.post("/internal/tuning/jobs/{job_id}/end")
    async def end(request: Request, job_id: str) -> Response:
        trainers, given = await read(request, End)
        return said(await trainers.end(job_id, given))

    @api.post("/internal/tuning/unfinished")
    async def unfinished(request: Request) -> Response:
        trainers, _ = await read(request, dict)
        return said(await trainers.unfinished())


def said(answer: object) -> Response:
    """As JSON."""
    return Response(msgspec.json.encode(answer), media_type="application/json")
