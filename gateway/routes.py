"""Everything of the gateway that is not generation: health, metrics, the list of models."""

import os

import msgspec
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest, multiprocess

from common import errors
from common.workers import Model, WorkerTable


def add_routes(api: FastAPI) -> None:
    """Add them to the app; `state` has table, aliases and registry once it is up."""

    @api.get("/health")
    async def health() -> dict[str, str]:
        """The process answers."""
        return {"status": "ok"}

    @api.get("/ready")
    async def ready(request: Request) -> Response:
        """At least one worker answers."""
        states = request.app.state.table.states()
        if states["ready"]:
            return JSONResponse({"status": "ready", "workers": states})
        return JSONResponse({"status": "no worker is ready", "workers": states}, 503, {"retry-after": "2"})

    @api.get("/metrics")
    async def metrics(request: Request) -> Response:
        """Prometheus text, of every gateway process of this container."""
        request.app.state.metrics.count()
        registry = request.app.state.registry
        if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
            registry = CollectorRegistry()
            multiprocess.MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    @api.get("/v1/models")
    async def models(request: Request) -> dict[str, object]:
        """Every model some worker serves, and every alias of one."""
        found = models_and_aliases(request)
        return {"object": "list", "data": [describe(found[name], request.app.state.table) for name in sorted(found)]}

    @api.get("/v1/models/{name:path}")
    async def model(request: Request, name: str) -> dict[str, object]:
        """One model."""
        found = models_and_aliases(request).get(name)
        if found is None:
            raise errors.NotFound(f"The model {name!r} does not exist.", param="model", code="model_not_found")
        return describe(found, request.app.state.table)


def models_and_aliases(request: Request) -> dict[str, Model]:
    """By name. An alias looks like the model it stands for; what stands for nothing served is left out."""
    found: dict[str, Model] = request.app.state.table.models()
    targets: dict[str, str] = request.app.state.aliases.targets
    return found | {
        alias: msgspec.structs.replace(found[name], id=alias, parent=name)
        for alias, name in targets.items() if name in found
    }


def describe(model: Model, table: WorkerTable) -> dict[str, object]:
    """A model in OpenAI's shape, with vLLM's `max_model_len` and `parent`, its format, and whether it is awake."""
    served = model.id if model.id in table.models() else model.parent or model.id  # an alias is what it stands for
    return {
        "id": model.id, "object": "model", "created": model.created, "owned_by": "owngpt",
        "max_model_len": model.max_model_len, "parent": model.parent, "format": model.format or None,
        "state": table.state_of(served),
    }
