"""The public routes of the jobs service. What a file, a job or a batch is stands elsewhere."""

from typing import Annotated, Literal

from fastapi import FastAPI, Path, Query, Request, Response
from fastapi.responses import FileResponse

from common import errors
from common.serving import Owner
from services.jobs.aliases import NAME, PutAlias, public
from services.jobs.batch import CreateBatch
from services.jobs.files import UPLOADS, page
from services.jobs.tuning import CreateJob
from services.jobs.upload import received

MULTIPART_OVERHEAD_BYTES = 64 * 1024
FORM = {"required": True, "content": {"multipart/form-data": {"schema": {
    "type": "object", "required": ["file", "purpose"], "properties": {
        "file": {"type": "string", "contentMediaType": "application/octet-stream"},
        "purpose": {"type": "string", "enum": list(UPLOADS)}}}}}}
"""An upload, as the OpenAPI document says it."""


After = Annotated[str | None, Query()]
Verb = Annotated[str, Path(json_schema_extra={"enum": ["cancel", "pause", "resume"]})]
Limit = Annotated[int, Query(ge=1, le=100)]


def add_routes(api: FastAPI) -> None:
    """All of them."""
    for add in (add_files, add_tuning, add_batches, add_models, add_aliases):
        add(api)


def add_files(api: FastAPI) -> None:
    """/v1/files."""

    @api.post("/v1/files", openapi_extra={"requestBody": FORM})
    async def upload(request: Request, who: Owner) -> dict[str, object]:
        """A multipart form: `file` and `purpose`."""
        length = request.headers.get("content-length", "")
        if not length.isdigit():
            raise errors.InvalidRequest("The upload needs a Content-Length.", code="length_required")
        await request.app.state.files.admit(who, max(0, int(length) - MULTIPART_OVERHEAD_BYTES))
        async with received(request, request.app.state.files.folder) as form:
            purpose = form.fields.pop("purpose", None)
            if form.filename is None:
                raise errors.InvalidRequest("The form has no file in its field 'file'.", param="file")
            if ignored := next(iter(form.fields), None):
                raise errors.InvalidRequest(f"{ignored}: files are kept until they are deleted; leave it out.",
                                            param=ignored)
            if purpose not in UPLOADS:
                raise errors.InvalidRequest(
                    f"The purpose is {purpose!r}; it can be {' or '.join(map(repr, UPLOADS))}.", param="purpose"
                )
            kept = await request.app.state.files.add(form.file, form.filename, purpose, who)
        return dict(kept.public())

    @api.get("/v1/files")
    async def list_(
        request: Request,
        who: Owner,
        purpose: str | None = None,
        after: After = None,
        limit: Annotated[int, Query(ge=1, le=10_000)] = 1000,
        order: Literal["asc", "desc"] = "desc",
    ) -> dict[str, object]:
        found = [file.public() for file in await request.app.state.files.owned(who) if purpose in (None, file.purpose)]
        return page(found[::-1] if order == "asc" else found, after, limit)

    @api.get("/v1/files/{file_id}")
    async def retrieve(request: Request, who: Owner, file_id: str) -> dict[str, object]:
        return dict((await request.app.state.files.get(file_id, who)).public())

    @api.get("/v1/files/{file_id}/content")
    async def content(request: Request, who: Owner, file_id: str) -> Response:
        file = await request.app.state.files.get(file_id, who)
        return FileResponse(request.app.state.files.path(file), media_type="application/octet-stream")

    @api.delete("/v1/files/{file_id}")
    async def delete(request: Request, who: Owner, file_id: str) -> dict[str, object]:
        await request.app.state.files.delete(file_id, who)
        return {"id": file_id, "object": "file", "deleted": True}


def add_tuning(api: FastAPI) -> None:
    """/v1/fine_tuning."""

    @api.post("/v1/fine_tuning/jobs")
    async def create_job(request: Request, who: Owner, asked: CreateJob) -> dict[str, object]:
        return dict((await request.app.state.tuning.create(asked, who)).public())

    @api.get("/v1/fine_tuning/jobs")
    async def list_jobs(request: Request, who: Owner, after: After = None, limit: Limit = 20) -> dict[str, object]:
        wanted = {k[9:-1]: v for k, v in request.query_params.items() if k.startswith("metadata[") and k.endswith("]")}
        return page(
            [
                job.public()
                for job in await request.app.state.tuning.owned(who)
                if wanted.items() <= (job.metadata or {}).items()
            ],
            after,
            limit,
        )

    @api.get("/v1/fine_tuning/jobs/{job_id}")
    async def get_job(request: Request, who: Owner, job_id: str) -> dict[str, object]:
        return dict((await request.app.state.tuning.get(job_id, who)).public())

    @api.get("/v1/fine_tuning/jobs/{job_id}/events")
    async def events(
        request: Request, who: Owner, job_id: str, after: After = None, limit: Limit = 20
    ) -> dict[str, object]:
        job = await request.app.state.tuning.get(job_id, who)
        return page(await request.app.state.tuning.events(job), after, limit)

    @api.get("/v1/fine_tuning/jobs/{job_id}/checkpoints")
    async def checkpoints(
        request: Request, who: Owner, job_id: str, after: After = None, limit: Limit = 10
    ) -> dict[str, object]:
        job = await request.app.state.tuning.get(job_id, who)
        return page(await request.app.state.tuning.checkpoints(job), after, limit)

    @api.post("/v1/fine_tuning/jobs/{job_id}/{verb}")
    async def change(request: Request, who: Owner, job_id: str, verb: Verb) -> dict[str, object]:
        tuning = request.app.state.tuning
        verbs = {"cancel": tuning.cancel, "pause": tuning.pause, "resume": tuning.resume}
        if verb not in verbs:
            raise errors.NotFound(f"There is nothing at {request.scope['path']}.")
        return dict((await verbs[verb](await tuning.get(job_id, who))).public())


def add_batches(api: FastAPI) -> None:
    """/v1/batches."""

    @api.post("/v1/batches")
    async def create_batch(request: Request, who: Owner, asked: CreateBatch) -> dict[str, object]:
        return dict((await request.app.state.batches.create(asked, who)).public())

    @api.get("/v1/batches")
    async def list_batches(request: Request, who: Owner, after: After = None, limit: Limit = 20) -> dict[str, object]:
        return page([batch.public() for batch in await request.app.state.batches.owned(who)], after, limit)

    @api.get("/v1/batches/{batch_id}")
    async def get_batch(request: Request, who: Owner, batch_id: str) -> dict[str, object]:
        return dict((await request.app.state.batches.get(batch_id, who)).public())

    @api.post("/v1/batches/{batch_id}/cancel")
    async def cancel_batch(request: Request, who: Owner, batch_id: str) -> dict[str, object]:
        return dict((await request.app.state.batches.cancel(batch_id, who)).public())


def add_models(api: FastAPI) -> None:
    """DELETE /v1/models/{name}; the gateway answers for the rest of /v1/models."""

    @api.delete("/v1/models/{name:path}")
    async def delete(request: Request, who: Owner, name: str) -> dict[str, object]:
        aliases = (await request.app.state.aliases.all()).values()
        used = [alias.name for alias in aliases if alias.model == name and alias.owner == who]
        if used:
            raise errors.InvalidRequest(
                f"The alias {', '.join(used)} stands for this model; switch or delete it first.", code="model_in_use"
            )
        await request.app.state.tuning.delete_model(name, who)
        return {"id": name, "object": "model", "deleted": True}


def add_aliases(api: FastAPI) -> None:
    """/v1/aliases."""

    @api.get("/v1/aliases")
    async def list_aliases(request: Request, who: Owner) -> dict[str, object]:
        found = (await request.app.state.aliases.all()).values()
        return {"object": "list", "data": [public(alias) for alias in found if alias.owner == who]}

    @api.get("/v1/aliases/{name}")
    async def get_alias(request: Request, who: Owner, name: str) -> dict[str, object]:
        return public(await request.app.state.aliases.get(name, who))

    @api.put("/v1/aliases/{name}")
    async def put_alias(
        request: Request, who: Owner, name: Annotated[str, Path(pattern=NAME)], asked: PutAlias
    ) -> dict[str, object]:
        served = request.app.state.table.models()
        if name in request.app.state.table.known_models:
            raise errors.InvalidRequest(f"{name!r} is the name of a model itself.", param="name", code="alias_taken")
        if asked.model not in served:
            raise errors.NotFound(
                f"The model {asked.model!r} is not served. There are: {', '.join(sorted(served))}.",
                param="model", code="model_not_found",
            )  # fmt: skip
        return public(await request.app.state.aliases.switch(name, asked.model, who))

    @api.post("/v1/aliases/{name}/rollback")
    async def rollback(request: Request, who: Owner, name: str) -> dict[str, object]:
        before = (await request.app.state.aliases.get(name, who)).previous
        if before and before not in request.app.state.table.models():
            text = f"The model before, {before!r}, is not served any more; the alias stays as it is."
            raise errors.InvalidRequest(text, code="model_not_found")
        return public(await request.app.state.aliases.rollback(name, who))

    @api.delete("/v1/aliases/{name}")
    async def delete(request: Request, who: Owner, name: str) -> dict[str, object]:
        await request.app.state.aliases.delete(await request.app.state.aliases.get(name, who))
        return {"id": name, "object": "alias", "deleted": True}
