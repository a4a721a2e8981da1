"""`/v1/responses/{id}`: what was answered, read and deleted by its key. Making one is work of the path and a worker."""

import re
from typing import Annotated, Literal

import msgspec
from fastapi import FastAPI, Query, Request, Response

from common.errors import InvalidRequest, NotFound
from common.keys import ApiKey
from common.responses.items import context, shown
from common.responses.store import ResponseStore
from gateway.turns import is_response_id

OWNER = "owngpt.key"
"""In a scope: the `ApiKey` that asks."""
JSON = "application/json"
_PLACE = re.compile(r"[0-9]{1,9}")


def add_response_routes(api: FastAPI) -> None:
    """Add them to the app; `state.responses` is there once it is up."""

    @api.get("/v1/responses/{name}")
    async def response(request: Request, name: str, stream: bool = False) -> Response:
        """A response, as it was answered."""
        if stream:
            raise InvalidRequest("stream: a response that is kept is not streamed again.", param="stream")
        return Response(await _read(request, name), media_type=JSON)

    @api.delete("/v1/responses/{name}")
    async def delete(request: Request, name: str) -> dict[str, object]:
        """Forget a response; what continues it cannot be continued any more."""
        store, owner = _of(request)
        if not is_response_id(name) or not await store.drop(owner, name):
            raise _missing(name)
        return {"id": name, "object": "response.deleted", "deleted": True}

    @api.get("/v1/responses/{name}/input_items")
    async def input_items(
        request: Request, name: str, limit: Annotated[int, Query(ge=1, le=100)] = 20,
        order: Literal["asc", "desc"] = "desc", after: str = "",
    ) -> Response:
        """What a response answered: everything that was said before and is still there, and its own input."""
        store, owner = _of(request)
        links = await store.listed(owner, name) if is_response_id(name) else []
        if not links:
            raise _missing(name)
        items = context(links)
        places = range(len(items)) if order == "asc" else range(len(items))[::-1]
        if after:
            place = after.rpartition("_")[2]
            if after != _named(name, place) or not _PLACE.fullmatch(place) or int(place) >= len(items):
                raise InvalidRequest(f"after: there is no item {after[:80]!r}.", param="after")
            places = places[places.index(int(place)) + 1 :]
        names = [_named(name, place) for place in places[:limit]]
        return Response(msgspec.json.encode({
            "object": "list",
            "data": [msgspec.Raw(shown(items[at], item)) for at, item in zip(places, names, strict=False)],
            "has_more": len(places) > limit,
            "first_id": names[0] if names else None, "last_id": names[-1] if names else None,
        }), media_type=JSON)

    @api.post("/v1/responses/{name}/cancel")
    async def cancel(request: Request, name: str) -> Response:
        """Only what runs in the background could be cancelled."""
        await _read(request, name)
        raise InvalidRequest("Only a response in the background can be cancelled, and there are none here.")


def _of(request: Request) -> tuple[ResponseStore, str]:
    key: ApiKey = request.scope[OWNER]
    return request.app.state.responses, key.id


async def _read(request: Request, name: str) -> bytes:
    store, owner = _of(request)
    said = await store.read(owner, name) if is_response_id(name) else None
    if said is None:
        raise _missing(name)
    return said


def _named(name: str, place: int | str) -> str:
    """What an item is called: a client's own names may come twice."""
    return f"item_{name}_{place}"


def _missing(name: str) -> NotFound:
    return NotFound(f"There is no response {name[:80]!r}.", param="response_id", code="response_not_found")
