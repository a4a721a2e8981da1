"""What watches the stack: Prometheus, its rules, Grafana's dashboards, Loki, Alloy. `python -m monitoring` writes what
is generated; `boards/` and `slo.py` are the sources."""
