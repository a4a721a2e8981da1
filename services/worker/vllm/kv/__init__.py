"""KV blocks in redis: a tier behind vLLM's own host tier, shared by all workers (docs/kv-cache.md).

Read in this order: `block` (what is stored, under which name), `wire` (how it travels), `economy` (when it pays),
`tier` (what vLLM's scheduler calls), `connector` and `spec` (where it is plugged in), `cpu_worker` (CPU only).
"""
