"""Let promtool and amtool read what Prometheus and Alertmanager will read: the containers' files and the launcher's."""

import itertools
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

from services.local.configs import prometheus_config
from services.local.plan import ROOT, Dials, Ports


def main() -> int:
    """0 when the tools are content with everything."""
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder, "prometheus.yml")
        dials = Dials(Path(folder))
        local.write_text(yaml.safe_dump(prometheus_config(dials, Ports.take(itertools.count(8001), 2))))
        configs = [local, ROOT / "monitoring/prometheus/prometheus.yml"]
        commands = [["promtool", "check", "config", str(path)] for path in configs]
        if shutil.which("amtool"):
            told = (ROOT / "monitoring/alertmanager/alertmanager.yml").read_text().replace("WEBHOOK_URL", "http://x/")
            Path(folder, "alertmanager.yml").write_text(told)
            commands.append(["amtool", "check-config", str(Path(folder, "alertmanager.yml"))])
        else:
            print("  amtool SKIPPED (not on PATH; Debian: prometheus-alertmanager)")
        return max(subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode for command in commands)


if __name__ == "__main__":
    sys.exit(main())
