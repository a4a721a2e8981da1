"""Every GPU through NVML, call by call: what a card or driver does not support is left out, what fails is counted.

NVML's units become base units: ratio, bytes, watts, joules, hertz, seconds. Not thread-safe: one thread calls it, so
that a driver that hangs holds up nothing but the next sample.
"""

import ctypes
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, TypeVar

import pynvml as n

from services.gpu_exporter.samples import Snapshot

MAX_PROCESSES = 16
"""Processes of a GPU with series of their own: those with the most memory."""

THROTTLE_REASONS = {
    "idle": n.nvmlClocksEventReasonGpuIdle,
    "applications_clocks": n.nvmlClocksEventReasonApplicationsClocksSetting,
    "sw_power_cap": n.nvmlClocksEventReasonSwPowerCap,
    "hw_slowdown": n.nvmlClocksThrottleReasonHwSlowdown,
    "sync_boost": n.nvmlClocksEventReasonSyncBoost,
    "sw_thermal": n.nvmlClocksEventReasonSwThermalSlowdown,
    "hw_thermal": n.nvmlClocksThrottleReasonHwThermalSlowdown,
    "hw_power_brake": n.nvmlClocksThrottleReasonHwPowerBrakeSlowdown,
    "display_clock": n.nvmlClocksEventReasonDisplayClockSetting,
}
VIOLATIONS = {
    "power": n.NVML_PERF_POLICY_POWER,
    "thermal": n.NVML_PERF_POLICY_THERMAL,
    "sync_boost": n.NVML_PERF_POLICY_SYNC_BOOST,
    "board_limit": n.NVML_PERF_POLICY_BOARD_LIMIT,
    "reliability": n.NVML_PERF_POLICY_RELIABILITY,
}
"""`nvmlDeviceGetViolationStatus` counts throttled time itself, so nothing is missed between samples."""
_UNSUPPORTED = (n.NVML_ERROR_NOT_SUPPORTED, n.NVML_ERROR_FUNCTION_NOT_FOUND, n.NVML_ERROR_NO_PERMISSION)
_LOST = (n.NVML_ERROR_GPU_IS_LOST, n.NVML_ERROR_RESET_REQUIRED)
Handle = Any
T = TypeVar("T")


class Unreachable(Exception):
    """There is no NVML to talk to; its text says why."""


class GpuLost(Exception):
    """One GPU does not answer any more; the others may."""


def memory_info(handle: Handle) -> Any:
    """As nvidia-smi counts: what the driver keeps for itself is not in use. Older drivers count it as that."""
    try:
        return n.nvmlDeviceGetMemoryInfo(handle, n.nvmlMemory_v2)
    except (n.NVMLError_FunctionNotFound, n.NVMLError_ArgumentVersionMismatch):
        return n.nvmlDeviceGetMemoryInfo(handle)


class Nvml:
    """NVML, opened and closed as often as need be. `open` raises Unreachable without a driver or a library.

    `failed` hears of calls that failed, by call and error; of unsupported ones it does not.
    """

    def __init__(self, failed: Callable[[str, str], None]) -> None:
        self._failed = failed
        self.xids: Counter[tuple[str, str]] = Counter()
        """XID errors by (gpu, xid)."""
        self._events: Any = None
        self._watched: dict[int | None, str] = {}
        """Which GPU has a handle: one that is lost cannot be asked any more."""

    def open(self) -> None:
        """Load the library and start it."""
        try:
            n.nvmlInit()
        except n.NVMLError as error:
            raise Unreachable(str(error)) from error

    def close(self) -> None:
        """Stop it; what fails is of no consequence."""
        with suppress(n.NVMLError):
            if self._events is not None:
                n.nvmlEventSetFree(self._events)
        self._events, self._watched = None, {}
        with suppress(n.NVMLError):
            n.nvmlShutdown()

    def sample(self) -> Snapshot:
        """All GPUs now. Raises Unreachable when the driver went away."""
        found = Snapshot()
        try:
            count = n.nvmlDeviceGetCount()
        except n.NVMLError as error:
            raise Unreachable(str(error)) from error
        driver = self._try("driver_version", n.nvmlSystemGetDriverVersion) or ""
        found.gauge("gpu_count", "GPUs the driver shows.", count)
        lost = 0
        for index in range(count):
            try:
                handle = self._try("handle", n.nvmlDeviceGetHandleByIndex, index)
                if handle is not None:
                    self._device(found, str(index), handle, str(driver))
            except GpuLost:
                lost += 1
                found.gauge("gpu_lost", "1: it fell off the bus, or needs a reset.", 1, gpu=str(index))
        self._hear_xids()
        if lost and lost == count:
            raise Unreachable("every GPU is lost")
        self._show_xids(found)
        return found

    def last_words(self) -> Snapshot:
        """What is known while there is nothing to sample."""
        found = Snapshot()
        self._show_xids(found)
        return found

    def _show_xids(self, found: Snapshot) -> None:
        for (gpu, xid), times in self.xids.items():
            found.counter("gpu_xid_errors", "XID errors by code: what they mean is in NVIDIA's XID catalogue.", times,
                          gpu=gpu, xid=xid)

    def _device(self, found: Snapshot, gpu: str, handle: Handle, driver: str) -> None:
        get = self._try
        name, uuid = get("name", n.nvmlDeviceGetName, handle), get("uuid", n.nvmlDeviceGetUUID, handle)
        found.gauge("gpu_info", "1; what this GPU is.", 1, gpu=gpu, name=str(name or ""), uuid=str(uuid or ""),
                    driver=driver)
        rates = get("utilization", n.nvmlDeviceGetUtilizationRates, handle)
        if rates is not None:
            found.gauge("gpu_utilization_ratio", "Share of time in which a kernel ran.", rates.gpu / 100, gpu=gpu)
            found.gauge("gpu_memory_controller_utilization_ratio", "Share of time in which memory was read or written.",
                        rates.memory / 100, gpu=gpu)
        self._memory(found, gpu, "", handle)
        self._power_and_heat(found, gpu, handle)
        self._clocks(found, gpu, handle)
        self._health(found, gpu, handle)
        for mig, part in self._mig_devices(handle):
            self._memory(found, gpu, mig, part)
        self._watch(gpu, handle)

    def _memory(self, found: Snapshot, gpu: str, mig: str, handle: Handle) -> None:
        """Of a GPU (`mig` empty) or of one of its MIG devices."""
        memory = self._try("memory", memory_info, handle)
        if memory is not None:
            found.gauge("gpu_memory_used_bytes", "Memory in use; `mig` names a part of the GPU.", memory.used,
                        gpu=gpu, mig=mig)
            found.gauge("gpu_memory_total_bytes", "Memory there is.", memory.total, gpu=gpu, mig=mig)
        processes = self._try("processes", n.nvmlDeviceGetComputeRunningProcesses, handle) or []
        known = [process for process in processes if process.usedGpuMemory is not None]
        for process in sorted(known, key=lambda p: -p.usedGpuMemory)[:MAX_PROCESSES]:
            found.gauge("gpu_process_memory_bytes", "Memory of one process, the largest ones.", process.usedGpuMemory,
                        gpu=gpu, mig=mig, pid=str(process.pid))

    def _power_and_heat(self, found: Snapshot, gpu: str, handle: Handle) -> None:
        get = self._try
        found.gauge("gpu_power_watts", "Power drawn.", _over(get("power", n.nvmlDeviceGetPowerUsage, handle), 1e3),
                    gpu=gpu)
        limit = get("power_limit", n.nvmlDeviceGetEnforcedPowerLimit, handle)
        found.gauge("gpu_power_limit_watts", "Power it may draw.", _over(limit, 1e3), gpu=gpu)
        energy = get("energy", n.nvmlDeviceGetTotalEnergyConsumption, handle)
        found.counter("gpu_energy_joules", "Energy used since the driver was loaded.", _over(energy, 1e3), gpu=gpu)
        heat = get("temperature", n.nvmlDeviceGetTemperatureV, handle, n.NVML_TEMPERATURE_GPU)
        if heat is None:  # drivers before R570
            heat = get("temperature", n.nvmlDeviceGetTemperature, handle, n.NVML_TEMPERATURE_GPU)
        found.gauge("gpu_temperature_celsius", "Temperature of the chip.", heat, gpu=gpu)
        for threshold, kind in (("shutdown", n.NVML_TEMPERATURE_THRESHOLD_SHUTDOWN),
                                ("slowdown", n.NVML_TEMPERATURE_THRESHOLD_SLOWDOWN)):
            found.gauge("gpu_temperature_threshold_celsius", "Where it slows down, or turns itself off.",
                        get("threshold", n.nvmlDeviceGetTemperatureThreshold, handle, kind),
                        gpu=gpu, threshold=threshold)

    def _clocks(self, found: Snapshot, gpu: str, handle: Handle) -> None:
        get = self._try
        for clock, kind in (("sm", n.NVML_CLOCK_SM), ("memory", n.NVML_CLOCK_MEM)):
            now, most = get("clock", n.nvmlDeviceGetClockInfo, handle, kind), get(
                "clock_max", n.nvmlDeviceGetMaxClockInfo, handle, kind)
            found.gauge("gpu_clock_hertz", "Clock now.", _over(now, 1e-6), gpu=gpu, clock=clock)
            found.gauge("gpu_clock_max_hertz", "Highest clock.", _over(most, 1e-6), gpu=gpu, clock=clock)
        reasons = get("throttle", n.nvmlDeviceGetCurrentClocksEventReasons, handle)
        if reasons is not None:
            for reason, bit in THROTTLE_REASONS.items():
                found.gauge("gpu_throttle_active", "1 while this holds the clock down.", float(bool(reasons & bit)),
                            gpu=gpu, reason=reason)
        for reason, policy in VIOLATIONS.items():
            held = get("violation", n.nvmlDeviceGetViolationStatus, handle, policy)
            found.counter("gpu_throttle_seconds", "Time the clock was held down.",
                          None if held is None else held.violationTime / 1e9, gpu=gpu, reason=reason)

    def _health(self, found: Snapshot, gpu: str, handle: Handle) -> None:
        get = self._try
        for kind, code in (("corrected", n.NVML_MEMORY_ERROR_TYPE_CORRECTED),
                           ("uncorrected", n.NVML_MEMORY_ERROR_TYPE_UNCORRECTED)):
            found.counter("gpu_ecc_errors", "Memory errors over the life of the GPU.",
                          get("ecc", n.nvmlDeviceGetTotalEccErrors, handle, code, n.NVML_AGGREGATE_ECC),
                          gpu=gpu, type=kind)
        rows = get("remapped_rows", n.nvmlDeviceGetRemappedRows, handle)
        if rows is not None:
            corrected, uncorrected, pending, failed = rows
            found.gauge("gpu_remapped_rows", "Memory rows replaced by spare ones.", corrected + uncorrected, gpu=gpu)
            found.gauge("gpu_row_remap_pending", "1: a reset of the GPU will replace a row.", pending, gpu=gpu)
            found.gauge("gpu_row_remap_failed", "1: there is no spare row left; replace the GPU.", failed, gpu=gpu)
        for direction, counter in (("received", n.NVML_PCIE_UTIL_RX_BYTES), ("sent", n.NVML_PCIE_UTIL_TX_BYTES)):
            found.gauge("gpu_pcie_bytes_per_second", "PCIe traffic, a sample of 20 ms.",
                        _over(get("pcie", n.nvmlDeviceGetPcieThroughput, handle, counter), 1 / 1024),
                        gpu=gpu, direction=direction)
        found.counter("gpu_pcie_replays", "PCIe packets sent again: a bad slot or riser.",
                      get("pcie_replays", n.nvmlDeviceGetPcieReplayCounter, handle), gpu=gpu)

    def _mig_devices(self, handle: Handle) -> Iterator[tuple[str, Handle]]:
        mode = self._try("mig_mode", n.nvmlDeviceGetMigMode, handle)
        if mode is None or mode[0] != n.NVML_DEVICE_MIG_ENABLE:
            return
        for number in range(self._try("mig_count", n.nvmlDeviceGetMaxMigDeviceCount, handle) or 0):
            with suppress(n.NVMLError):  # the numbers have holes
                yield str(number), n.nvmlDeviceGetMigDeviceHandleByIndex(handle, number)

    def _watch(self, gpu: str, handle: Handle) -> None:
        """Ask the driver to tell of XID errors, once a GPU."""
        if gpu in self._watched.values():
            return
        self._watched[_address(handle)] = gpu
        if self._events is None:
            self._events = self._try("event_set", n.nvmlEventSetCreate)
        if self._events is not None:
            self._try("register_events", n.nvmlDeviceRegisterEvents, handle, n.nvmlEventTypeXidCriticalError,
                      self._events)

    def _hear_xids(self) -> None:
        """Take in the XID errors since the last sample."""
        while self._events is not None:
            try:
                event = n.nvmlEventSetWait_v2(self._events, 1)
            except n.NVMLError as error:
                if error.value not in (n.NVML_ERROR_TIMEOUT, *_UNSUPPORTED):
                    self._failed("event_wait", _name(error))
                return
            self.xids[self._watched.get(_address(event.device), ""), str(event.eventData)] += 1

    def _try(self, call: str, function: Callable[..., T], *args: object) -> T | None:
        """The call's answer; None when it is not supported or fails. Raises GpuLost, or Unreachable for all of them."""
        try:
            return function(*args)
        except n.NVMLError as error:
            if error.value not in _UNSUPPORTED:
                self._failed(call, _name(error))
            if error.value in _LOST:
                raise GpuLost(str(error)) from error
            if error.value == n.NVML_ERROR_UNINITIALIZED:
                raise Unreachable(str(error)) from error
            return None


def _address(handle: Handle) -> int | None:
    """What a handle points at: the same for all handles of a GPU."""
    return ctypes.cast(handle, ctypes.c_void_p).value


def _over(value: float | None, by: float) -> float | None:
    """value / by, or None."""
    return None if value is None else value / by


def _name(error: n.NVMLError) -> str:
    """An error as a label: NVMLError_GpuIsLost -> GpuIsLost."""
    return type(error).__name__.removeprefix("NVMLError_")
