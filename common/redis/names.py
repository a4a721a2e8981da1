"""Every key and channel name in both redis servers. `docs/redis.md` is made from what stands here and in `scripts.py`.

What is live and bounded. State redis (AOF, noeviction):

    worker:{id}           string, JSON `Heartbeat`, lives HEARTBEAT_TTL_MS   the worker's agent
    workers               set of worker ids that ever registered             the agent; reaped by gateways
    running:{id}          hash, record id -> JSON `Record` begun there       whoever meters
    reaped:{id}           string with a TTL: some of its requests were lost  gateways
    usage                 stream, one entry per ended request, field `r`     whoever meters
    flushed:{recorder}    string with a TTL, number of the last flush        whoever meters
    key:{id}              string, JSON `ApiKey`                              python -m gateway.keys
    adapters              hash, model name -> JSON `Adapter`                 trainer; removed by the jobs service
    wake:{model}          hash with a TTL, gateway -> requests that wait     gateways
    place:{place}         hash with a TTL, member -> how it is (JSON)        agents; the trainer
    aliases               hash, alias -> JSON `Alias`                        jobs service; followed by gateways
    response:{key}:{id}   hash with a TTL: response, items, previous (JSON)  whoever meters; removed by gateways
    responses:{key}       sorted set, response id -> when it was last used   as above
    responsesizes:{key}   hash, response id -> bytes                         as above

redis-cache (LRU, no persistence), where everything has a TTL and may be evicted:

    answer:{digest}           checksum and JSON document                     whoever meters
    kv:{namespace}:{digest}   header and bytes of a KV chunk                 workers
    kvseen:kv:...             a chunk that was computed but not admitted     workers
"""

HEARTBEAT_TTL_MS = 3000
WORKERS = "workers"
USAGE = "usage"
USAGE_MAX_ENTRIES = 300_000
"""Some 650 bytes each: 200 MB of the state redis. Older ones are in the ledger's sums."""
ADAPTERS = "adapters"
ALIASES = "aliases"

CHANNEL_WORKERS = "workers"
"""JSON `Heartbeat`s."""
CHANNEL_KEYS = "keys"
"""Ids of revoked keys."""
CHANNEL_HELD = "held"
"""Digests of bodies that killed workers."""
CHANNEL_ALIASES = "aliases"
"""JSON `Alias`es that changed."""


def worker_key(worker_id: str) -> str:
    """Where a worker's heartbeat lives."""
    return f"worker:{worker_id}"


def running_key(worker_id: str) -> str:
    """Where the requests begun on a worker live."""
    return f"running:{worker_id}"


def wake_key(model: str) -> str:
    """Where gateways say that requests wait for a model that sleeps."""
    return f"wake:{model}"


def place_key(place: str) -> str:
    """Where the engines of a place say whose turn it is."""
    return f"place:{place}"


def reaped_key(worker_id: str) -> str:
    """Where it is noted that requests of a worker were settled as lost."""
    return f"reaped:{worker_id}"


def flushed_key(recorder: str) -> str:
    """Where it is noted which flush of a recorder was the last one written."""
    return f"flushed:{recorder}"


def api_key_key(key_id: str) -> str:
    """Where an API key's record lives."""
    return f"key:{key_id}"


def response_key(owner: str, response_id: str) -> str:
    """Where a response lives."""
    return f"response:{owner}:{response_id}"


def responses_key(owner: str) -> str:
    """Which responses an owner has, and when each was last used."""
    return f"responses:{owner}"


def response_sizes_key(owner: str) -> str:
    """How large each of an owner's responses is."""
    return f"responsesizes:{owner}"
