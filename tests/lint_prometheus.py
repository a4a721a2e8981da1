"""Render Prometheus's configuration as the launcher does and let promtool read it."""

import subprocess
import sys
import tempfile
from pathlib import Path

from services.local.plan import ROOT, render


def main() -> int:
    """promtool's exit status."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "prometheus.yml")
        path.write_text(render(ROOT / "monitoring/prometheus.yml.template",
                               {"GATEWAY_TARGET": '"127.0.0.1:1"', "WORKER_TARGETS": '"127.0.0.1:2"', "TRAINER_TARGET": '"127.0.0.1:3"'}))
        command = ["promtool", "check", "config", str(path)]
        return subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
