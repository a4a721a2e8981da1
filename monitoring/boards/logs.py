"""What happened? From a number to the lines behind it."""

from monitoring.panels import Board, Panel, q

BOARD = Board(
    "owngpt-logs", "OwnGPT · Logs", "Lines of all services. A request id (X-Request-Id of every answer) leads to everything about it.",
    {
        "One request": (
            Panel("Everything about a request", "logs", "", "Of the request id above: type it in, or click a dot on the panel "
                  "Time to first token.",
                  q('{service=~".+"} | request_id="$request_id"')),
        ),
        "Requests": (
            Panel("Slow requests", "logs", "", "First token after more than 1 s.",
                  q('{service="worker"} | json | event="request" | ttft_s > 1')),
            Panel("Failed requests", "logs", "", "What workers and nginx saw.",
                  q('{service=~"worker|nginx"} | json | outcome=~"upstream_error|stream_error|refused" or status >= 500')),
        ),
        "Services": (
            Panel("Warnings and errors", "logs", "", "Of our own services.", q('{level=~"warning|error|critical"}')),
            Panel("Workers come and go", "logs", "", "Starts, states, deaths.",
                  q('{service=~"worker|gateway"} |~ "worker joined|worker left|worker silent|engine died|worker state"')),
        ),
    },
    texts=("request_id",),
    needs="Loki",
)  # fmt: skip
