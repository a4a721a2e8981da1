"""What the jobs service exports: batches, and the queue of fine-tuning jobs. How runs go, the trainer exports."""

from prometheus_client import CollectorRegistry, Counter, Gauge

from common.tasks import failures_counter


class JobsMetrics:
    """Defined once; `batches.py` counts, `app.py` reads the queue when it is scraped."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.active = Gauge("owngpt_batches_active", "Batches that are not over.",
                            registry=registry)
        self.in_flight = Gauge("owngpt_batch_requests_in_flight", "Requests of batches on their way.",
                               registry=registry)
        self.waiting = Gauge("owngpt_batch_lines_waiting", "Lines of batches that nobody has asked yet.",
                             registry=registry)
        self.lines = Counter("owngpt_batch_lines", "Answered lines: completed or failed.", ("result",),
                             registry=registry)
        self.ended = Counter("owngpt_batches_ended", "Batches by how they ended.", ("status",),
                             registry=registry)
        self.queued = Gauge("owngpt_tuning_jobs_queued", "Fine-tuning jobs that wait for the trainer.",
                            registry=registry)
        self.failures = failures_counter(registry)
        for result in ("completed", "failed"):
            self.lines.labels(result)
        for status in ("completed", "failed", "cancelled", "expired"):
            self.ended.labels(status)
