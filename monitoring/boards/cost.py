"""What does it cost, and who uses it?"""

from monitoring.panels import Board, Panel, q

PER_S = "sum(owngpt_cost_usd_per_hour) / 3600"
OUT = "sum(rate(owngpt_tokens_total{kind=\"completion\"}[1h]))"
ALL = "sum(rate(owngpt_tokens_total{kind=~\"prompt|completion\"}[1h]))"
WORK = 'sum by (key) (increase(owngpt_key_tokens_total{kind="completion"}[$__range]))'

BOARD = Board(
    "owngpt-cost", "OwnGPT · Cost", "Money (HOURLY_USD, BUDGET_USD) and who uses it.",
    {
        "Money": (
            Panel("An hour costs", "stat", "currencyUSD", "HOURLY_USD.", q("sum(owngpt_cost_usd_per_hour)")),
            Panel("Today", "stat", "currencyUSD", "Since midnight UTC, while the stack ran.",
                  q("sum(owngpt_cost_today_usd)")),
            Panel("This month", "stat", "currencyUSD", "Since the first, UTC.", q("sum(owngpt_cost_month_usd)")),
            Panel("The month will cost", "stat", "currencyUSD", "If the stack keeps running.",
                  q("sum(owngpt_cost_month_forecast_usd)")),
            Panel("Budget left", "stat", "currencyUSD", "BUDGET_USD less what is spent.",
                  q("sum(owngpt_budget_month_usd) - sum(owngpt_cost_month_usd)"), good_above=0),
            Panel("Budget used", "gauge", "percentunit", "Of this month's.",
                  q("sum(owngpt_cost_month_usd) / (sum(owngpt_budget_month_usd) > 0)"), good_below=0.9),
        ),
        "Per token": (
            Panel("1M generated tokens", "stat", "currencyUSD",
                  "The hour's price over the tokens generated in the last hour. Falls when the machine is busier.",
                  q(f"{PER_S} / ({OUT} > 0) * 1e6")),
            Panel("1M tokens, read or generated", "stat", "currencyUSD", "The same over all tokens.",
                  q(f"{PER_S} / ({ALL} > 0) * 1e6")),
            Panel("Paid for idling", "stat", "currencyUSD", "Of an hour's price: while no request ran.",
                  q("sum(owngpt_cost_usd_per_hour) * (1 - avg_over_time((sum(vllm:num_requests_running) > bool 0)[1h:15s]))")),
            Panel("Caches save an hour", "stat", "currencyUSD",
                  "Cached prompt tokens of the last hour at the price of 1M tokens above.",
                  q(f'sum(rate(owngpt_tokens_total{{kind="cached"}}[1h])) * 3600 * {PER_S} / ({ALL} > 0)')),
            Panel("Tokens per dollar", "timeseries", "short", "Generated tokens a dollar buys at this moment.",
                  q("sum(rate(owngpt_tokens_total{kind=\"completion\"}[$__rate_interval])) * 3600 / "
                    "(sum(owngpt_cost_usd_per_hour) > 0)", "tokens")),
        ),
        "Who": (
            Panel("Generated tokens by key", "bargauge", "short", "In the time shown, the ten largest. Key ids: "
                  "python -m gateway.keys list.",
                  q(f"topk(10, {WORK})", "{{key}}")),
            Panel("Share of the work", "bargauge", "percentunit", "Of generated tokens, which is what takes time.",
                  q(f"topk(10, {WORK} / ignoring (key) group_left () (sum({WORK}) > 0))", "{{key}}")),
            Panel("Requests by key", "timeseries", "reqps", "Keys beyond the first 200 are one: others.",
                  q("sum by (key) (rate(owngpt_key_requests_total[$__rate_interval]))", "{{key}}"), stacked=True),
            Panel("Tokens by key", "timeseries", "short", "Per second, read and generated.",
                  q('sum by (key) (rate(owngpt_key_tokens_total{kind=~"prompt|completion"}[$__rate_interval]))',
                    "{{key}}"), stacked=True),
            Panel("Usage stream read", "stat", "s", "Since the ledger last saw its end.",
                  q("time() - max(owngpt_ledger_last_read_timestamp_seconds)"), good_below=120),
            Panel("Usage records dropped", "stat", "short", "Lost while redis was away too long.",
                  q("sum(owngpt_usage_records_dropped)"), good_below=1),
        ),
    },
)  # fmt: skip
