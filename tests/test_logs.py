"""From a line to Loki: which labels it gets, where its ids go, what is left out; and that the files fit together."""

import json
import logging
import re

import yaml

from monitoring.boards import BOARDS
from services.local.plan import ROOT
from services.worker.vllm.logformat import JsonFormatter
from tests import alloy

LABELS = {"service", "level"}


def docker(line: str, service: str | None = "gateway") -> str:
    """A line as Docker's json-file driver writes it with `labels: com.docker.compose.service`."""
    wrapper = {"log": line + "\n", "stream": "stdout", "time": "2026-11-25T09:10:06.097123456Z"}
    return json.dumps(wrapper | ({"attrs": {"com.docker.compose.service": service}} if service else {}))


def test_a_request_line_has_two_labels_and_its_ids_beside_them() -> None:
    line = json.dumps({"ts": "…", "level": "info", "event": "request", "service": "worker", "request_id": "r" * 32, "key": "k1",
                       "model": "m", "worker": "w1", "trace_id": "t", "ttft_s": 0.2})
    entry = alloy.carry_out(docker(line, "worker"))
    assert entry is not None
    assert entry.labels == {"service": "worker", "level": "info"}
    assert entry.metadata == {"request_id": "r" * 32, "key": "k1", "model": "m", "worker": "w1", "trace_id": "t"}
    assert json.loads(entry.line)["ttft_s"] == 0.2
    assert entry.stamp == "2026-11-25T09:10:06.097123456Z"


def test_what_is_not_json_still_arrives() -> None:
    entry = alloy.carry_out(docker("1:M 25 Nov 2026 * Ready to accept connections", "redis"))
    assert entry is not None
    assert (entry.labels, entry.metadata) == ({"service": "redis"}, {})
    assert "Ready" in entry.line


def test_other_projects_containers_stay_out() -> None:
    assert alloy.carry_out(docker("x", None)) is None


def test_the_number_of_streams_is_bounded() -> None:
    """However many requests, keys and workers: a stream per service and level."""
    streams = set()
    for number in range(200):
        line = json.dumps({"level": "info", "event": "request", "request_id": f"r{number}", "key": f"k{number}", "worker": f"w{number}"})
        entry = alloy.carry_out(docker(line, "worker"))
        assert entry is not None
        assert set(entry.labels) <= LABELS
        streams.add(tuple(sorted(entry.labels.items())))
    assert len(streams) == 1


def test_the_panels_ask_for_labels_there_are() -> None:
    for board in BOARDS:
        for panel in board.panels():
            for expression, _ in panel.queries if panel.kind == "logs" else ():
                selector = re.match(r"\{([^}]*)\}", expression)
                assert selector, expression
                assert set(re.findall(r"(\w+)[=!]", selector[1])) <= LABELS, expression


def test_loki_keeps_ids_out_of_the_index_and_forgets_in_time() -> None:
    loki = yaml.safe_load((ROOT / "monitoring/loki/loki.yaml").read_text())
    assert loki["limits_config"]["allow_structured_metadata"] is True
    assert loki["schema_config"]["configs"][0]["schema"] == "v13"  # structured metadata needs it
    assert loki["compactor"]["retention_enabled"] is True
    assert loki["limits_config"]["retention_period"] == "168h"
    assert loki["analytics"]["reporting_enabled"] is False
    assert f":{loki['server']['http_listen_port']}/" in alloy.CONFIG.read_text()


def test_dashboards_and_data_sources_know_each_other() -> None:
    sources = yaml.safe_load((ROOT / "monitoring/grafana/provisioning/datasources/owngpt.yaml").read_text())["datasources"]
    uids = {source["uid"] for source in sources}
    boards = {}
    for path in (ROOT / "monitoring/grafana/dashboards").glob("*.json"):
        board = json.loads(path.read_text())
        boards[board["uid"]] = board
        ids = [panel["id"] for panel in board["panels"]]
        assert len(ids) == len(set(ids))
        taken: set[tuple[int, int]] = set()
        for panel in board["panels"]:
            place = panel["gridPos"]
            cells = {(place["x"] + dx, place["y"] + dy) for dx in range(place["w"]) for dy in range(place["h"])}
            assert place["x"] + place["w"] <= 24
            assert not cells & taken, (path.name, panel["title"])
            taken |= cells
            if panel["type"] != "row":
                assert panel["description"], (path.name, panel["title"])
                assert panel["datasource"]["uid"] in uids
                assert panel["targets"]
    assert set(boards) == {board.uid for board in BOARDS}
    links = json.dumps(sources)
    for uid in re.findall(r"/grafana/d/([\w-]+)", links):
        assert uid in boards
    assert '"request_id"' in json.dumps(boards["owngpt-logs"]["templating"])
    home = (ROOT / "monitoring/grafana/grafana.ini").read_text()
    assert "/owngpt-overview.json" in home


def test_vllms_own_lines_are_json_whatever_is_in_them() -> None:
    try:
        raise ValueError('a "quoted"\nproblem')
    except ValueError:
        import sys

        record = logging.LogRecord("vllm.x", logging.ERROR, "f.py", 1, 'two\nlines and %s', ('"quotes"',), sys.exc_info())
    line = JsonFormatter().format(record)
    assert "\n" not in line
    said = json.loads(line)
    assert (said["level"], said["event"], said["service"]) == ("error", 'two\nlines and "quotes"', "engine")
    assert "problem" in said["exception"]
