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
    aliases               hash, alias -> JSON `Alias`                        jobs service; followed by gateways
    file:{id}             string, JSON `File`                                jobs service, trainer
    files:{owner}         sorted set of file ids by creation                 jobs service, trainer
    ftjob:{id}            hash, the fields of `Job`, changed by MOVE only    jobs service, trainer
    ftjobs:{owner}        sorted set of job ids by creation                  jobs service
    ftqueue, fttaken      lists of job ids: waiting, taken by a trainer      jobs service, trainer
    ftlease:{id}          string with a TTL: a trainer works on it           trainer
    ftevents:{id}         list of JSON events, oldest first                  jobs service, trainer
    ftcheckpoints:{id}    list of JSON checkpoints, oldest first             trainer
    bt:{id}               hash, the fields of `Batch`, changed by MOVE only  jobs service
    bts:{owner}           sorted set of batch ids by creation                jobs service
    btactive              set of ids of batches that are not over            jobs service
    used:{day}:{key}      hash, `{model}|{kind}` -> count                    ledger
    ledger:cursor         string, the last usage entry that is added up      ledger
    ledger:cost:{day}     string, USD                                        ledger
    ledger:tick           string, Unix time up to which money is counted     ledger

redis-cache (LRU, no persistence), where everything has a TTL and may be evicted:

    answer:{digest}           checksum and JSON document                     whoever meters
    kv:{namespace}:{digest}   header and bytes of a KV chunk                 workers
    kvseen:kv:...             a chunk that was computed but not admitted     workers
"""

from datetime import date

HEARTBEAT_TTL_MS = 3000
WORKERS = "workers"
USAGE = "usage"
USAGE_MAX_ENTRIES = 300_000
"""Some 650 bytes each: 200 MB of the state redis. Older ones are in the ledger's books."""
ADAPTERS = "adapters"
ALIASES = "aliases"
FT_QUEUE = "ftqueue"
FT_TAKEN = "fttaken"
BATCHES_ACTIVE = "btactive"
LEDGER_CURSOR = "ledger:cursor"
LEDGER_TICK = "ledger:tick"

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


def reaped_key(worker_id: str) -> str:
    """Where it is noted that requests of a worker were settled as lost."""
    return f"reaped:{worker_id}"


def flushed_key(recorder: str) -> str:
    """Where it is noted which flush of a recorder was the last one written."""
    return f"flushed:{recorder}"


def api_key_key(key_id: str) -> str:
    """Where an API key's record lives."""
    return f"key:{key_id}"


def file_key(file_id: str) -> str:
    """Where a file's record lives."""
    return f"file:{file_id}"


def files_key(owner: str) -> str:
    """Where an owner's files are listed."""
    return f"files:{owner}"


def job_key(job_id: str) -> str:
    """Where a fine-tuning job lives."""
    return f"ftjob:{job_id}"


def jobs_key(owner: str) -> str:
    """Where an owner's fine-tuning jobs are listed."""
    return f"ftjobs:{owner}"


def lease_key(job_id: str) -> str:
    """Held by the trainer that works on a job."""
    return f"ftlease:{job_id}"


def events_key(job_id: str) -> str:
    """Where a job's events are."""
    return f"ftevents:{job_id}"


def checkpoints_key(job_id: str) -> str:
    """Where a job's checkpoints are."""
    return f"ftcheckpoints:{job_id}"


def batch_key(batch_id: str) -> str:
    """Where a batch lives."""
    return f"bt:{batch_id}"


def batches_key(owner: str) -> str:
    """Where an owner's batches are listed."""
    return f"bts:{owner}"


def used_key(day: date, key: str) -> str:
    """Where one key's usage of one day is."""
    return f"used:{day.isoformat()}:{key}"


def cost_key(day: date) -> str:
    """Where the cost of a day is."""
    return f"ledger:cost:{day.isoformat()}"
