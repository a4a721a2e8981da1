"""`python -m services.gpu_exporter --port N`: sample GPUs and host, and serve /metrics.

The driver is asked in a thread of its own. While there is none, or it fails, `gpu_nvml_up` is 0 and it is tried again;
while it hangs, scrapes show the last sample and its growing age. Neither ends the process.
"""

import argparse
import signal
import threading
import time

import psutil
from loguru import logger
from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server

from common import logs
from services.gpu_exporter import host
from services.gpu_exporter.nvml import Nvml, Unreachable
from services.gpu_exporter.samples import Shown
from services.gpu_exporter.settings import ExporterSettings

RETRY_S = 10.0


class Exporter:
    """The sampling threads and what they show."""

    def __init__(self, settings: ExporterSettings) -> None:
        self._settings = settings
        self.registry = CollectorRegistry()
        self._shown = Shown()
        self.registry.register(self._shown)
        self._up = Gauge("gpu_nvml_up", "1 while the NVIDIA driver answers.", registry=self.registry)
        self._failed = Counter("gpu_nvml_errors", "NVML calls that failed; unsupported ones are not counted.",
                               ("call", "error"), registry=self.registry)
        self._sampled_at = time.monotonic()
        Gauge("gpu_sample_age_seconds", "Since the driver last answered; grows while it hangs.", registry=self.registry
              ).set_function(lambda: time.monotonic() - self._sampled_at)

    def start(self) -> None:
        """Both threads, as daemons: a hanging driver must not keep the process."""
        for work in (self._gpus, self._host):
            threading.Thread(target=work, name=work.__name__.strip("_"), daemon=True).start()

    def _gpus(self) -> None:
        said, nvml = "", Nvml(self._count_failure)
        while True:
            try:
                nvml.open()
                logger.info("NVML answers")
                said = ""
                while True:
                    self._shown.put("gpu", nvml.sample())
                    self._up.set(1)
                    self._sampled_at = time.monotonic()
                    time.sleep(self._settings.sample_every_s)
            except Unreachable as error:
                if str(error) != said:
                    logger.warning("no GPU to be seen; trying again", reason=str(error), every_s=RETRY_S)
                said = str(error)
            except Exception:  # a bug in a reading must not end the exporter
                logger.exception("sampling failed")
            nvml.close()
            self._up.set(0)
            self._shown.put("gpu", nvml.last_words())
            self._sampled_at = time.monotonic()
            time.sleep(min(RETRY_S, 5 * self._settings.sample_every_s))

    def _count_failure(self, call: str, error: str) -> None:
        self._failed.labels(call, error).inc()

    def _host(self) -> None:
        psutil.cpu_percent(None)  # the first call has nothing to compare with
        while True:
            time.sleep(self._settings.sample_every_s)
            self._shown.put("host", host.sample(self._settings.disks))


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m services.gpu_exporter", description=__doc__.splitlines()[0])
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on (default: %(default)s)")
    args = parser.parse_args()
    settings = ExporterSettings()
    logs.configure("gpu_exporter", settings.log_level)
    exporter = Exporter(settings)
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    exporter.start()
    start_http_server(args.port, args.host, exporter.registry)
    logger.info("exporter up", port=args.port)
    stopping.wait()


if __name__ == "__main__":
    main()
