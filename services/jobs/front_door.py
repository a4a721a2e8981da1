"""How batches ask: over HTTP, by the gateway's door like everybody, in the name of their owner.

The gateway decides, limits and pays as for any request; it knows this service by its token, takes the owner from
`X-OwnGPT-Owner`, and marks the request as work that can wait.
"""

from typing import Any, NamedTuple

import httpx
import msgspec

TIMEOUT_S = 3600.0
CONNECT_TIMEOUT_S = 5.0
MAX_CONNECTIONS = 1024


class Answer(NamedTuple):
    """What came back. No document: it cannot be read; or it broke off (502), and may have been computed; or nobody was
    reached (503)."""

    status: int
    document: Any

    @property
    def deadly(self) -> bool:
        """Whether a worker died of it, or while it was there; the gateway holds it back for a while if two did."""
        error = (self.document or {}).get("error")
        return isinstance(error, dict) and error.get("code") in ("request_held_back", "upstream_error")


class FrontDoor:
    """One request at a time through the gateway."""

    def __init__(self, gateway_url: str, service_token: str) -> None:
        self._http = httpx.AsyncClient(
            base_url=gateway_url, headers={"authorization": f"Bearer {service_token}"},
            timeout=httpx.Timeout(TIMEOUT_S, connect=CONNECT_TIMEOUT_S),
            limits=httpx.Limits(max_connections=MAX_CONNECTIONS, max_keepalive_connections=MAX_CONNECTIONS),
        )

    async def __call__(self, endpoint: str, body: bytes, owner: str, request_id: str, payer: str = "") -> Answer:
        """The answer to one request of `owner`, who pays for it unless `payer` does."""
        try:
            answer = await self._http.post(endpoint, content=body, headers={
                "content-type": "application/json", "x-request-id": request_id, "x-owngpt-owner": owner,
                "x-owngpt-payer": payer,
            })  # fmt: skip
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout):
            return Answer(503, None)
        except httpx.HTTPError:
            return Answer(502, None)
        try:
            return Answer(answer.status_code, msgspec.json.decode(answer.content, type=dict))
        except (msgspec.MsgspecError, UnicodeDecodeError):
            return Answer(answer.status_code, None)

    async def close(self) -> None:
        """At the end of the lifespan."""
        await self._http.aclose()
