"""Render nginx's configuration as the launcher does, let nginx itself and gixy read it."""

import itertools
import subprocess
import sys
import tempfile
from pathlib import Path

from services.local.configs import find_nginx, write_configs
from services.local.plan import Dials, Ports
from services.secrets.__main__ import make


def main() -> int:
    """0 when both are content."""
    with tempfile.TemporaryDirectory() as folder:
        dials = Dials(Path(folder))
        dials.run_dir.mkdir(mode=0o700, exist_ok=True)
        make(dials.secrets)
        write_configs(dials, Ports.take(itertools.count(8001), 1))
        config = str(dials.run_dir / "nginx.conf")
        command = [find_nginx(), "-t", "-q", "-p", str(dials.run_dir), "-e", "stderr", "-c", config]
        test = subprocess.run(command, check=False)
        # host_spoofing: Grafana compares Host with Origin, port included, and $host has no port.
        # add_header_redefinition: the error locations add Retry-After and keep what matters.
        # missing_resolver: workers are reached by address, never by name. http_splitting: $uri is on an exact list.
        # version_disclosure: server_tokens is off; the finding wants more modules than there are.
        lint = subprocess.run([str(Path(sys.executable).parent / "gixy"), "--skips",
                               "host_spoofing,add_header_redefinition,version_disclosure,http_splitting,missing_resolver", config],
                              capture_output=True, text=True, check=False)
        if lint.returncode:
            print(lint.stdout[-4000:], lint.stderr[-2000:])
        return test.returncode or lint.returncode


if __name__ == "__main__":
    sys.exit(main())
