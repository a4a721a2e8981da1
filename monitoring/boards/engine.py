"""Where does the time go inside the engines?"""

from monitoring.panels import Board, Panel, q, quantiles


def _mean(phase: str) -> str:
    name = f"vllm:request_{phase}_time_seconds"
    return f"sum(rate({name}_sum[$__rate_interval])) / (sum(rate({name}_count[$__rate_interval])) > 0)"


def _ratio(part: str, whole: str) -> str:
    return f"sum(rate({part}[$__rate_interval])) / (sum(rate({whole}[$__rate_interval])) > 0)"


BOARD = Board(
    "owngpt-engine", "OwnGPT · Engine", "vLLM from the inside: queue, batch, KV blocks, speed.",
    {
        "Now": (
            Panel("Engines", "stat", "short", "Engines that give metrics.", q("count(vllm:num_requests_running)")),
            Panel("Running", "stat", "short", "Requests in the batch.", q("sum(vllm:num_requests_running)")),
            Panel("Waiting", "stat", "short", "Requests in the queue.", q("sum(vllm:num_requests_waiting)"),
                  good_below=10),
            Panel("KV blocks in use", "gauge", "percentunit", "The fullest engine. Full: requests wait or are thrown out.",
                  q("max(vllm:kv_cache_usage_perc)"), good_below=0.95),
            Panel("Generated tokens/s", "stat", "short", "All engines.",
                  q("sum(rate(vllm:generation_tokens_total[$__rate_interval]))")),
            Panel("Prefix hits", "stat", "percentunit", "Prompt tokens found in the engine's own KV blocks.",
                  q(_ratio("vllm:prefix_cache_hits_total", "vllm:prefix_cache_queries_total"))),
        ),
        "Queue and batch": (
            Panel("Running and waiting", "timeseries", "short", "By engine. Uneven lines: one worker owns a hot prefix.",
                  (("vllm:num_requests_running", "running {{instance}}"),
                   ("vllm:num_requests_waiting", "waiting {{instance}}"))),
            Panel("Why they wait", "timeseries", "short", "capacity: no room in the batch; deferred: KV blocks on their way.",
                  q("sum by (reason) (vllm:num_requests_waiting_by_reason)", "{{reason}}"), stacked=True),
            Panel("Time in the queue", "timeseries", "s", "Before the first step.",
                  quantiles("vllm:request_queue_time_seconds")),
            Panel("Tokens in a step", "timeseries", "short",
                  "The batch size in tokens. The GPU is busy when this is large; see the lab.",
                  q("sum by (instance) (rate(vllm:iteration_tokens_total_sum[$__rate_interval])) / "
                    "(sum by (instance) (rate(vllm:iteration_tokens_total_count[$__rate_interval])) > 0)",
                    "{{instance}}")),
            Panel("Steps per second", "timeseries", "ops", "The engine's heartbeat. Zero with running requests: stalled.",
                  q("sum by (instance) (rate(vllm:iteration_tokens_total_count[$__rate_interval]))", "{{instance}}")),
            Panel("Load balance", "timeseries", "short", "Busiest engine over the mean; 1 is even.",
                  q("max(vllm:num_requests_running) / clamp_min(avg(vllm:num_requests_running), 1)", "busiest over mean")),
        ),
        "Speed": (
            Panel("Time to first token", "timeseries", "s", "As the engine counts it: queue and prefill.",
                  quantiles("vllm:time_to_first_token_seconds")),
            Panel("Time between tokens", "timeseries", "s", "One step each, as long as requests decode.",
                  quantiles("vllm:inter_token_latency_seconds")),
            Panel("Where a request's time goes", "timeseries", "s", "Means: queue, prefill, decode. The log line of each "
                  "request has its own three.",
                  tuple((_mean(phase), phase) for phase in ("queue", "prefill", "decode")), stacked=True),
            Panel("Generated tokens by engine", "timeseries", "short", "Per second.",
                  q("sum by (instance) (rate(vllm:generation_tokens_total[$__rate_interval]))", "{{instance}}")),
            Panel("Read tokens by engine", "timeseries", "short", "Per second, cached ones among them.",
                  q("sum by (instance) (rate(vllm:prompt_tokens_total[$__rate_interval]))", "{{instance}}")),
            Panel("Prompt lengths", "heatmap", "short", "Tokens of a prompt.",
                  q("sum by (le) (increase(vllm:request_prompt_tokens_bucket[$__rate_interval]))", "{{le}}")),
            Panel("Answer lengths", "heatmap", "short", "Tokens of an answer.",
                  q("sum by (le) (increase(vllm:request_generation_tokens_bucket[$__rate_interval]))", "{{le}}")),
        ),
        "KV blocks": (
            Panel("In use", "timeseries", "percentunit", "By engine.", q("vllm:kv_cache_usage_perc", "{{instance}}")),
            Panel("Where prompt tokens come from", "timeseries", "short",
                  "Computed here, found in the engine's own blocks, or brought from redis and host memory. Per second.",
                  q("sum by (source) (rate(vllm:prompt_tokens_by_source_total[$__rate_interval]))", "{{source}}"),
                  stacked=True),
            Panel("Preemptions", "timeseries", "ops", "Requests thrown out for want of blocks and computed again. More "
                  "than none for long: raise KV_CACHE_GIB, or lower MAX_NUM_SEQS.",
                  q("sum by (instance) (rate(vllm:num_preemptions_total[$__rate_interval]))", "{{instance}}")),
        ),
        "Ends": (
            Panel("Finished by reason", "timeseries", "reqps", "stop, length, abort (the client left), error, repetition.",
                  q("sum by (finished_reason) (rate(vllm:request_success_total[$__rate_interval]))",
                    "{{finished_reason}}"), stacked=True),
            Panel("Refused by the engine", "timeseries", "reqps", "vLLM's own admission limits; none is set by default.",
                  q("sum by (reason) (rate(vllm:admission_rejections_total[$__rate_interval])) or vector(0)",
                    "{{reason}}")),
            Panel("Adapters", "table", "short", "LoRA adapters that run or wait, by engine.",
                  q("vllm:lora_requests_info")),
        ),
    },
)  # fmt: skip
