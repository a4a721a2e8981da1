"""Are users well served, and what is in the way?"""

from monitoring.panels import Board, Panel, q, quantiles
from monitoring.slo import BURNS, SLOS, TPOT_S, TTFT_S

AVAILABILITY, TTFT, TPOT = SLOS

BOARD = Board(
    "owngpt-overview", "OwnGPT · Overview", "Are users well served? Start here.",
    {
        "Are users well served?": (
            Panel("Availability, 30 days", "stat", "percentunit",
                  f"Share of requests that did not fail by our fault; promised are {AVAILABILITY.objective:.1%}. "
                  "Red: look at the error budget and at requests by result below.",
                  q(f"1 - {AVAILABILITY.ratio('30d')}"), good_above=AVAILABILITY.objective),
            Panel("Error budget left", "gauge", "percentunit",
                  "What is left of the failures that the objective allows in 30 days. Below zero: stop changing things.",
                  q(f"1 - {AVAILABILITY.ratio('30d')} / {1 - AVAILABILITY.objective:.3f}"), good_above=0.1),
            Panel(f"First token within {float(TTFT_S):g} s", "stat", "percentunit",
                  f"Share of streams in the last hour; promised are {TTFT.objective:.0%}. Red: more workers, shorter "
                  "prompts, or a cache that does not hit.",
                  q(f"1 - {TTFT.ratio('1h')}"), good_above=TTFT.objective),
            Panel(f"Tokens within {float(TPOT_S):g} s", "stat", "percentunit",
                  f"Share of streams of the last hour whose tokens came at least this fast on average; promised are "
                  f"{TPOT.objective:.0%}. Red: batches too large for this hardware.",
                  q(f"1 - {TPOT.ratio('1h')}"), good_above=TPOT.objective),
            Panel("Workers ready", "stat", "short", "Workers that take requests, as the gateway sees them.",
                  q('max(gateway_workers{state="ready"})'), good_above=1),
            Panel("Alerts firing", "stat", "short", "The table below names them; each has a page in docs/runbooks.",
                  q('count(ALERTS{alertstate="firing",severity!="none"}) or vector(0)'), good_below=1),
        ),
        "Requests": (
            Panel("Requests by result", "timeseries", "reqps",
                  "What the gateway decided: fast (nginx carries the answer), relay (the gateway does), answer (from "
                  "memory), or an error's status.",
                  q("sum by (result) (rate(gateway_decisions_total[$__rate_interval]))", "{{result}}"), stacked=True),
            Panel("Error budget burn", "timeseries", "short",
                  "1: the budget lasts exactly 30 days. Alerts start at the factors of the SRE workbook: "
                  + ", ".join(f"{burn.factor:g} over {burn.long}" for burn in BURNS) + ".",
                  tuple((f"{AVAILABILITY.ratio(w)} / {1 - AVAILABILITY.objective:.3f}", w) for w in ("5m", "1h", "6h"))),
            Panel("How requests end", "timeseries", "reqps",
                  "As the workers saw it: ok, client_error, cancelled, refused, upstream_error, stream_error.",
                  q("sum by (outcome) (rate(owngpt_requests_total[$__rate_interval]))", "{{outcome}}"), stacked=True),
            Panel("Time to first token", "timeseries", "s", "Streams of people, batches left out, measured at the worker.",
                  quantiles("gen_ai_server_time_to_first_token_seconds")),
            Panel("Time between tokens", "timeseries", "s", "Mean of each stream. People read at about 0.1 s a token.",
                  quantiles("gen_ai_server_time_per_output_token_seconds")),
            Panel("Duration", "timeseries", "s", "Whole requests, batches among them.",
                  quantiles("gen_ai_server_request_duration_seconds")),
            Panel("Tokens", "timeseries", "short", "Per second: prompt tokens read, how many of them were cached, and "
                  "tokens generated.",
                  q("sum by (kind) (rate(owngpt_tokens_total[$__rate_interval]))", "{{kind}}")),
            Panel("In flight and waiting", "timeseries", "short",
                  "Requests in the engines. Waiting for minutes: add a worker, or lower what batches may take.",
                  (("sum(vllm:num_requests_running)", "running"), ("sum(vllm:num_requests_waiting)", "waiting"))),
            Panel("Taken over and lost", "timeseries", "reqps",
                  "Requests that a worker refused, failed or died under. Another worker took them over, unless bytes had "
                  "been sent already.",
                  (("sum by (reason) (rate(gateway_retries_total[$__rate_interval])) or vector(0)", "{{reason}}"),
                   ("sum(rate(gateway_lost_requests_total[$__rate_interval]))", "running on a lost worker"))),
        ),
        "What is in the way?": (
            Panel("Alerts", "table", "short", "Pending and firing. Watchdog always fires: it shows that alerts work.",
                  q("ALERTS")),
            Panel("Targets down", "stat", "short", "Programs that give no metrics.",
                  q("count(up == 0) or vector(0)"), good_below=1),
            Panel("Workers lost today", "stat", "short", "Workers that went without draining in 24 h.",
                  q("max(increase(gateway_workers_lost_total[1d]))"), good_below=1),
            Panel("Workers by state", "timeseries", "short", "As the gateway sees them.",
                  q("max by (state) (gateway_workers)", "{{state}}"), stacked=True),
            Panel("What a decision takes", "timeseries", "s",
                  "The gateway's time before a request is forwarded, body included. The budget is 1 ms.",
                  quantiles("gateway_decision_seconds")),
            Panel("nginx connections", "timeseries", "short", "Open ones; writing are those being answered.",
                  (("nginx_connections_active", "active"), ("nginx_connections_writing", "writing"))),
            Panel("CPU of the host", "timeseries", "percentunit", "All cores together.",
                  q("host_cpu_utilization_ratio", "cpu")),
            Panel("Memory of the host", "timeseries", "bytes", "At the top the kernel kills the largest process.",
                  (("host_memory_used_bytes", "used"), ("host_memory_total_bytes", "there is"))),
            Panel("Memory by program", "timeseries", "bytes", "Resident memory. A line that only climbs is a leak.",
                  q("sum by (job) (process_resident_memory_bytes)", "{{job}}")),
        ),
    },
)  # fmt: skip
