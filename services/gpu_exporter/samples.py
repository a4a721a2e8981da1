"""A snapshot of metrics: collected by one thread, shown to every scrape as it is."""

from collections.abc import Iterable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

Labels = tuple[str, ...]


class Snapshot:
    """Metric families under construction. A value of None is left out: the driver does not tell."""

    def __init__(self) -> None:
        self._families: dict[str, Metric] = {}
        self._label_names: dict[str, Labels] = {}

    def gauge(self, name: str, what: str, value: float | None, /, **labels: str) -> None:
        """One sample of a gauge."""
        self._add(GaugeMetricFamily, name, what, value, labels)

    def counter(self, name: str, what: str, value: float | None, /, **labels: str) -> None:
        """One sample of a counter that somebody else counts; `name` without `_total`."""
        self._add(CounterMetricFamily, name, what, value, labels)

    def _add(
        self, kind: type[GaugeMetricFamily] | type[CounterMetricFamily], name: str, what: str, value: float | None,
        labels: dict[str, str],
    ) -> None:
        if value is None:
            return
        if name not in self._families:
            self._families[name] = kind(name, what, labels=list(labels))
            self._label_names[name] = tuple(labels)
        assert self._label_names[name] == tuple(labels), f"{name} has the labels {self._label_names[name]}"  # noqa: S101
        family = self._families[name]
        assert isinstance(family, kind)  # noqa: S101 - a name has one kind
        family.add_metric(list(labels.values()), value)

    def __iter__(self) -> Iterator[Metric]:
        return iter(self._families.values())


class Shown(Collector):
    """A Prometheus collector that shows the last snapshots, so a scrape never waits for a driver."""

    def __init__(self) -> None:
        self._parts: dict[str, Iterable[Metric]] = {}

    def put(self, part: str, snapshot: Iterable[Metric]) -> None:
        """Replace one part (`gpu`, `host`)."""
        self._parts = {**self._parts, part: snapshot}

    def collect(self) -> Iterator[Metric]:
        """What prometheus_client calls."""
        for part in list(self._parts.values()):
            yield from part
