"""The exporter with a driver that is none (fake_nvml.c, loaded in place of libnvidia-ml.so.1)."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from services.gpu_exporter.settings import ExporterSettings
from services.ledger.neighbours import Samples, read_samples
from services.local.plan import ROOT
from tests.harness import free_ports, wait_for

pytestmark = pytest.mark.skipif(shutil.which("gcc") is None, reason="there is no gcc on PATH to build the fake driver")


class Exporter:
    """A running exporter whose card a test can change."""

    def __init__(self, folder: Path, library: Path | None) -> None:
        self.card, self.log = folder / "card", folder / "exporter.log"
        self.set()
        self.port = free_ports(1)[0]
        env = os.environ | {"FAKE_NVML": str(self.card), "SAMPLE_EVERY_S": "0.1", "DISKS": f"{folder} /nowhere",
                            "LD_LIBRARY_PATH": str(library) if library else ""}
        self.process = subprocess.Popen([sys.executable, "-m", "services.gpu_exporter", "--port", str(self.port)], cwd=ROOT,
                                        env=env, stdout=open(self.log, "w"), stderr=subprocess.STDOUT)
        wait_for(lambda: self.samples().get("host_cpus"), "a first sample")

    def set(self, **values: int) -> None:
        """Write the card anew, all at once. Two underscores stand for a colon."""
        partial = self.card.with_suffix(".partial")
        partial.write_text("".join(f"{name.replace('__', ':')} {value}\n" for name, value in values.items()))
        partial.rename(self.card)

    def samples(self) -> Samples:
        return read_samples(httpx.get(f"http://127.0.0.1:{self.port}/metrics").text)

    def value(self, name: str, /, **labels: str) -> float | None:
        return next((v for own, v in self.samples().get(name, []) if labels.items() <= own.items()), None)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nvml")
    subprocess.run(["gcc", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-o", str(folder / "libnvidia-ml.so.1"),
                    str(ROOT / "tests/fake_nvml.c")], check=True)
    return folder


@pytest.fixture
def exporter(tmp_path: Path, library: Path) -> Iterator[Exporter]:
    made = Exporter(tmp_path, library)
    yield made
    made.process.kill()
    made.process.wait()


def test_memory_that_the_driver_keeps_is_not_in_use(exporter: Exporter) -> None:
    """An empty H100 showed 480 MiB in use, beside nvidia-smi's none."""
    exporter.set(mem_used0=500 << 20, mem_reserved0=480 << 20)
    wait_for(lambda: exporter.value("gpu_memory_used_bytes", gpu="0", mig="") == 20 << 20, "what is in use")


def test_units_are_base_units(exporter: Exporter) -> None:
    exporter.set(util0=57, power0=250_500, clock0=1200, violation_1_0=5_000_000_000, reasons0=8, energy0=7_200_000)
    wait_for(lambda: exporter.value("gpu_utilization_ratio", gpu="0") == 0.57, "0.57")
    assert exporter.value("gpu_power_watts", gpu="0") == 250.5
    assert exporter.value("gpu_clock_hertz", gpu="0", clock="sm") == 1.2e9
    assert exporter.value("gpu_throttle_seconds_total", gpu="0", reason="thermal") == 5
    assert exporter.value("gpu_throttle_active", gpu="0", reason="hw_slowdown") == 1
    assert exporter.value("gpu_throttle_active", gpu="0", reason="sw_power_cap") == 0
    assert exporter.value("gpu_energy_joules_total", gpu="0") == 7200
    assert exporter.value("gpu_memory_total_bytes", gpu="0", mig="") == 80 * 2**30
    assert exporter.value("gpu_pcie_bytes_per_second", gpu="0", direction="received") == 2048 * 1024
    assert exporter.value("gpu_info", gpu="0", name="NVIDIA A100-SXM4-80GB", driver="590.1") == 1
    assert exporter.value("gpu_nvml_up") == 1


def test_a_divided_gpu_shows_its_parts(exporter: Exporter) -> None:
    exporter.set(devices=2, mig1=3)
    wait_for(lambda: exporter.value("gpu_memory_total_bytes", gpu="1", mig="2"), "three parts")
    assert exporter.value("gpu_memory_total_bytes", gpu="1", mig="") == 80 * 2**30
    assert exporter.value("gpu_memory_total_bytes", gpu="1", mig="0") == 20 * 2**30
    assert exporter.value("gpu_utilization_ratio", gpu="1") is None  # the driver has none for it
    assert exporter.value("gpu_utilization_ratio", gpu="0") is not None


def test_processes_are_bounded(exporter: Exporter) -> None:
    exporter.set(processes0=40)
    wait_for(lambda: len(exporter.samples()["gpu_process_memory_bytes"]) == 16, "the sixteen largest")
    assert exporter.value("gpu_process_memory_bytes", pid="1039") == 40 * 2**30


def test_what_a_card_does_not_support_is_left_out_and_what_fails_is_counted(exporter: Exporter) -> None:
    exporter.set(fail__nvmlDeviceGetPowerUsage=3, fail__nvmlDeviceGetTotalEccErrors=999)
    wait_for(lambda: exporter.value("gpu_nvml_errors_total", call="ecc"), "a counted failure")
    assert exporter.value("gpu_power_watts") is None
    assert exporter.value("gpu_ecc_errors_total") is None
    assert exporter.value("gpu_nvml_errors_total", call="power") is None
    assert exporter.value("gpu_temperature_celsius", gpu="0") == 55


def test_xid_errors_by_code(exporter: Exporter) -> None:
    exporter.set(devices=2, xid1=79)
    wait_for(lambda: exporter.value("gpu_xid_errors_total", gpu="1", xid="79") == 1, "XID 79")
    exporter.set(devices=2, xid1=31)
    wait_for(lambda: exporter.value("gpu_xid_errors_total", gpu="1", xid="31") == 1, "XID 31")
    assert exporter.value("gpu_xid_errors_total", gpu="1", xid="79") == 1


def test_one_lost_gpu_hides_neither_the_others_nor_its_xid(exporter: Exporter) -> None:
    """XID 79 says that a GPU fell off the bus: whoever asks that GPU for its number hears nothing (E1)."""
    exporter.set(devices=2)
    wait_for(lambda: exporter.value("gpu_power_watts", gpu="1"), "both")
    exporter.set(devices=2, lost1=1, xid1=79)
    wait_for(lambda: exporter.value("gpu_xid_errors_total", gpu="1", xid="79") == 1, "XID 79")
    assert exporter.value("gpu_lost", gpu="1") == 1
    assert exporter.value("gpu_power_watts", gpu="0") == 250
    assert exporter.value("gpu_power_watts", gpu="1") is None
    assert exporter.value("gpu_nvml_up") == 1
    exporter.set(devices=2, lost0=1, lost1=1, xid0=79, xid1=79)
    wait_for(lambda: exporter.value("gpu_nvml_up") == 0, "down")
    assert exporter.value("gpu_xid_errors_total", gpu="0", xid="79") == 1
    assert exporter.value("gpu_xid_errors_total", gpu="1", xid="79") == 1


def test_a_driver_before_r570_has_another_call_for_the_temperature(exporter: Exporter) -> None:
    exporter.set(fail__nvmlDeviceGetTemperatureV=13)
    wait_for(lambda: exporter.value("gpu_temperature_celsius", gpu="0") == 56, "the older call's answer")
    assert exporter.value("gpu_nvml_errors_total", call="temperature") is None


def test_a_driver_that_goes_and_comes_back(exporter: Exporter) -> None:
    wait_for(lambda: exporter.value("gpu_nvml_up") == 1, "up")
    exporter.set(fail__nvmlDeviceGetUtilizationRates=15)  # GPU is lost
    wait_for(lambda: exporter.value("gpu_nvml_up") == 0, "down")
    assert exporter.value("gpu_power_watts") is None
    assert exporter.value("host_memory_total_bytes")
    exporter.set()
    wait_for(lambda: exporter.value("gpu_nvml_up") == 1, "up again")
    lines = exporter.log.read_text().splitlines()
    assert sum("no GPU to be seen" in line for line in lines) == 1
    assert exporter.process.poll() is None


def test_a_driver_that_hangs_holds_up_nobody(exporter: Exporter) -> None:
    wait_for(lambda: exporter.value("gpu_nvml_up") == 1, "up")
    exporter.set(hang=1)
    wait_for(lambda: (exporter.value("gpu_sample_age_seconds") or 0) > 1, "an old sample")
    assert exporter.value("gpu_power_watts", gpu="0") == 250
    exporter.set()
    wait_for(lambda: (exporter.value("gpu_sample_age_seconds") or 9) < 1, "fresh again")


def test_without_a_gpu_there_is_the_host(tmp_path: Path) -> None:
    exporter = Exporter(tmp_path, None)
    try:
        assert exporter.value("gpu_nvml_up") == 0
        assert exporter.value("gpu_count") is None
        assert 0 <= (exporter.value("host_cpu_utilization_ratio") or 0) <= 1
        assert exporter.value("host_cpus") == os.cpu_count()
        assert (exporter.value("host_memory_used_bytes") or 0) < (exporter.value("host_memory_total_bytes") or 0)
        disks = {labels["folder"] for labels, _ in exporter.samples()["host_disk_free_bytes"]}
        assert disks == {str(tmp_path)}  # what is not there is left out
        assert "no GPU to be seen" in exporter.log.read_text()
        exporter.process.terminate()
        assert exporter.process.wait(5) == 0
    finally:
        exporter.process.kill()


def test_settings_are_checked() -> None:
    assert ExporterSettings(disks="/a /b").disks == (Path("/a"), Path("/b"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="sample_every_s"):
        ExporterSettings(sample_every_s=0)
