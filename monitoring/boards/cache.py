"""What do the caches save?"""

from monitoring.panels import Board, Panel, q

HIT = 'sum(rate(gateway_answers_total{result=~"hit|joined"}[$__rate_interval]))'
ASKED = 'sum(rate(gateway_answers_total{result=~"hit|joined|miss"}[$__rate_interval]))'

BOARD = Board(
    "owngpt-cache", "OwnGPT · Cache", "Answers from memory, KV blocks in redis, and the two redis servers.",
    {
        "Saved": (
            Panel("Answers from memory", "stat", "percentunit", "Of the questions whose answer may be kept.",
                  q(f"{HIT} / ({ASKED} > 0)")),
            Panel("Prompt tokens not computed", "stat", "percentunit", "Found in KV blocks, here or in redis.",
                  q("sum(rate(vllm:prompt_tokens_cached_total[$__rate_interval])) / "
                    "(sum(rate(vllm:prompt_tokens_total[$__rate_interval])) > 0)")),
            Panel("Seconds saved per second", "stat", "short",
                  "Prefill time that blocks from redis made unnecessary, less what fetching them took; an estimate.",
                  q("sum(rate(owngpt_kv_seconds_saved_total[$__rate_interval])) or vector(0)")),
            Panel("Redis answers", "stat", "short", "Of two.", q("sum(redis_up)"), good_above=2),
            Panel("KV tier left alone", "stat", "short", "Workers to which redis-cache does not answer.",
                  q("sum(owngpt_kv_redis_away) or vector(0)"), good_below=1),
        ),
        "Answers": (
            Panel("Questions by result", "timeseries", "reqps",
                  "hit, joined (the same question was being answered), miss.",
                  q("sum by (result) (rate(gateway_answers_total[$__rate_interval]))", "{{result}}"), stacked=True),
            Panel("Answers for the cache", "timeseries", "reqps",
                  "stored by workers; not_kept: too large, an error, an unknown shape; damaged when read.",
                  q("sum by (result) (rate(owngpt_answers_kept_total[$__rate_interval]))", "{{result}}"), stacked=True),
        ),
        "KV blocks": (
            Panel("Cached prompt tokens by source", "timeseries", "short", "Per second.",
                  q("sum by (source) (rate(vllm:prompt_tokens_cached_by_source_total[$__rate_interval]))", "{{source}}"),
                  stacked=True),
            Panel("Prefix hits", "timeseries", "percentunit", "local: the engine's own blocks; redis: the tier behind them.",
                  (("sum(rate(vllm:prefix_cache_hits_total[$__rate_interval])) / "
                    "(sum(rate(vllm:prefix_cache_queries_total[$__rate_interval])) > 0)", "local"),
                   ("sum(rate(vllm:external_prefix_cache_hits_total[$__rate_interval])) / "
                    "(sum(rate(vllm:external_prefix_cache_queries_total[$__rate_interval])) > 0)", "redis"))),
            Panel("Chunks by what became of them", "timeseries", "ops", "docs/kv-cache.md explains the words.",
                  q("sum by (result) (rate(owngpt_kv_blocks_total[$__rate_interval]))", "{{result}}"), stacked=True),
            Panel("Bytes", "timeseries", "Bps", "KV chunks loaded from and stored to redis.",
                  q("sum by (direction) (rate(owngpt_kv_bytes_total[$__rate_interval]))", "{{direction}}")),
            Panel("Host tier in use", "timeseries", "percentunit", "Memory between engine and redis.",
                  q("vllm:kv_offload_cpu_cache_usage_perc", "{{instance}}")),
        ),
        "Redis": (
            Panel("Memory", "timeseries", "bytes", "The cache is meant to be full; the state never evicts.",
                  (("redis_memory_used_bytes", "{{instance}}"), ("redis_memory_max_bytes > 0", "limit of {{instance}}"))),
            Panel("Memory by kind of key", "timeseries", "bytes", "By the first word of a key's name; docs/redis.md has them all.",
                  q("sum by (instance, key_group) (redis_key_group_memory_usage_bytes)", "{{key_group}}, {{instance}}"), stacked=True),
            Panel("Commands", "timeseries", "ops", "Per second.",
                  q("sum by (instance) (rate(redis_commands_processed_total[$__rate_interval]))", "{{instance}}")),
            Panel("Mean time of a command", "timeseries", "s", "A slow one holds up all others.",
                  q("sum by (instance) (rate(redis_commands_duration_seconds_total[$__rate_interval])) / "
                    "(sum by (instance) (rate(redis_commands_total[$__rate_interval])) > 0)", "{{instance}}")),
            Panel("Evicted and expired", "timeseries", "ops", "Keys per second.",
                  (("rate(redis_evicted_keys_total[$__rate_interval])", "evicted, {{instance}}"),
                   ("rate(redis_expired_keys_total[$__rate_interval])", "expired, {{instance}}"))),
            Panel("Clients", "timeseries", "short", "Connections.", q("redis_connected_clients", "{{instance}}")),
            Panel("State is on disk", "stat", "short", "1: the last write of the log succeeded.",
                  q('redis_aof_last_write_status{instance="redis"}'), good_above=1),
            Panel("Fragmentation", "timeseries", "short", "Resident memory over used memory.",
                  q("redis_mem_fragmentation_ratio", "{{instance}}")),
        ),
    },
)  # fmt: skip
