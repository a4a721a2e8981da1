"""What gateways do for workers that are lost."""

from redis.asyncio import Redis

from common.redis.names import USAGE, USAGE_MAX_ENTRIES, WORKERS, running_key, worker_key
from common.redis.scripts import REAP


async def reap(redis: Redis) -> int:
    """Record as `upstream_error` what lost workers left running. Returns how many requests that were."""
    lost = 0
    for worker_id in map(str, await redis.smembers(WORKERS)):
        if not await redis.exists(worker_key(worker_id)):
            keys = [worker_key(worker_id), running_key(worker_id), WORKERS, USAGE]
            count = int(await redis.eval(REAP, len(keys), *keys, worker_id, str(USAGE_MAX_ENTRIES)))
            lost += max(count, 0)
    return lost
