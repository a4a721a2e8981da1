"""A panel as data, and a board of panels as the JSON that Grafana reads.

The JSON is made by grafana-foundation-sdk, whose types know what Grafana accepts. Boards are files in `boards/`.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from grafana_foundation_sdk.builders import (
    bargauge,
    common,
    dashboard,
    gauge,
    heatmap,
    logs,
    loki,
    prometheus,
    stat,
    statetimeline,
    table,
    timeseries,
)
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import StackingMode
from grafana_foundation_sdk.models.dashboard import (
    DashboardLinkType,
    DataSourceRef,
    GridPos,
    Threshold,
    ThresholdsMode,
)
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

Kind = Literal["stat", "timeseries", "gauge", "bargauge", "table", "heatmap", "states", "logs"]
_BUILDERS: dict[Kind, Any] = {
    "stat": stat.Panel, "timeseries": timeseries.Panel, "gauge": gauge.Panel, "bargauge": bargauge.Panel,
    "table": table.Panel, "heatmap": heatmap.Panel, "states": statetimeline.Panel, "logs": logs.Panel,
}  # fmt: skip
WIDTHS = {"stat": 4, "gauge": 4, "bargauge": 8, "timeseries": 8, "heatmap": 12, "table": 12, "states": 12, "logs": 24}
HEIGHTS = {"stat": 4, "gauge": 4, "logs": 12}
COLUMNS = 24
PROMETHEUS, LOKI = DataSourceRef("prometheus", "prometheus"), DataSourceRef("loki", "loki")


@dataclass(frozen=True)
class Panel:
    """One panel. `queries` are (expression, legend); `what` says what it means and what to do about it."""

    title: str
    kind: Kind
    unit: str
    what: str
    queries: tuple[tuple[str, str], ...]
    stacked: bool = False
    good_below: float | None = None
    """The value from which the number turns red."""
    good_above: float | None = None
    """The value below which the number turns red."""

    @property
    def size(self) -> tuple[int, int]:
        """Width in columns and height in rows."""
        return WIDTHS[self.kind], HEIGHTS.get(self.kind, 8)


@dataclass(frozen=True)
class Board:
    """A dashboard: rows of panels by headline."""

    uid: str
    title: str
    what: str
    rows: dict[str, tuple[Panel, ...]]
    texts: tuple[str, ...] = ()
    """Variables that are typed in, or come with a link."""
    needs: str = ""
    """What must be there for its panels to show anything; empty: the stack alone."""

    def panels(self) -> Iterator[Panel]:
        """All of them."""
        for row in self.rows.values():
            yield from row


def q(expression: str, legend: str = "") -> tuple[tuple[str, str], ...]:
    """A single query."""
    return ((expression, legend),)


def quantiles(metric: str, by: str = "") -> tuple[tuple[str, str], ...]:
    """p50, p95 and p99 of a histogram."""
    labels = f"le, {by}" if by else "le"
    return tuple(
        (f"histogram_quantile({share}, sum by ({labels}) (rate({metric}_bucket[$__rate_interval])))",
         f"p{share * 100:g}" + (f" {{{{{by}}}}}" if by else ""))
        for share in (0.5, 0.95, 0.99)
    )  # fmt: skip


def render(board: Board) -> str:
    """The dashboard's JSON, the same text for the same board."""
    made = (
        dashboard.Dashboard(board.title).uid(board.uid).description(board.what).tags(["owngpt"]).readonly()
        .refresh("10s").time("now-30m", "now").timezone("browser")
        .link(dashboard.DashboardLink("Dashboards").type(DashboardLinkType.DASHBOARDS).tags(["owngpt"])
              .as_dropdown(True).keep_time(True))
    )  # fmt: skip
    for name in board.texts:
        made = made.with_variable(dashboard.TextBoxVariable(name).label(name.replace("_", " ")))
    y, number = 0, 0
    for headline, row in board.rows.items():
        made = made.with_row(dashboard.Row(headline).id(1000 + y).grid_pos(GridPos(h=1, w=COLUMNS, x=0, y=y)))
        y += 1
        x = tallest = 0
        for panel in row:
            width, height = panel.size
            if x + width > COLUMNS:
                x, y, tallest = 0, y + tallest, 0
            number += 1
            made = made.with_panel(_build(panel).id(number).grid_pos(GridPos(h=height, w=width, x=x, y=y)))
            x, tallest = x + width, max(tallest, height)
        y += tallest
    document: dict[str, Any] = json.loads(json.dumps(made.build(), cls=JSONEncoder))
    return json.dumps(document, indent=1, sort_keys=True) + "\n"


def _build(panel: Panel) -> Any:
    builder: Any = _BUILDERS[panel.kind]().title(panel.title).description(panel.what)
    builder = builder.datasource(LOKI) if panel.kind == "logs" else builder.datasource(PROMETHEUS).unit(panel.unit)
    if panel.kind in ("stat", "gauge", "bargauge"):
        builder = builder.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"])).no_value("no data")
        builder = builder.thresholds(_thresholds(panel))
    if panel.kind == "timeseries":
        builder = builder.fill_opacity(30 if panel.stacked else 8).show_points("never").min(0)
        if panel.stacked:
            builder = builder.stacking(common.StackingConfig().mode(StackingMode.NORMAL))
    for expression, legend in panel.queries:
        if panel.kind == "logs":
            builder = builder.with_target(loki.Dataquery().expr(expression).legend_format(legend).datasource(LOKI))
            continue
        query = prometheus.Dataquery().expr(expression).legend_format(legend or "__auto").datasource(PROMETHEUS)
        if "time_to_first_token_seconds_bucket" in expression:
            query = query.exemplar(True)
        if panel.kind == "table":
            query = query.instant().format(PromQueryFormat.TABLE)
        if panel.kind == "heatmap":
            query = query.format(PromQueryFormat.HEATMAP)
        builder = builder.with_target(query)
    return builder


def _thresholds(panel: Panel) -> dashboard.ThresholdsConfig:
    if panel.good_above is not None:
        steps = [Threshold(None, "red"), Threshold(panel.good_above, "green")]
    elif panel.good_below is not None:
        steps = [Threshold(None, "green"), Threshold(panel.good_below, "red")]
    else:
        steps = [Threshold(None, "blue")]
    return dashboard.ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(steps)
