"""Measurements: `make bench` prints the table of docs/log.md and writes bench/results/*.json."""
