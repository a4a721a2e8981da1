/* A libnvidia-ml.so.1 without a GPU: every answer comes from the file in FAKE_NVML, lines of `name value`, read anew at
 * each call, so a test can change the card while the exporter runs.
 *
 *   devices 2       util0 57        mem_used0 1000     power0 250000 (mW)    mig1 2 (MIG devices of GPU 1)
 *   fail:nvmlDeviceGetPowerUsage 3  that call returns 3 (NVML_ERROR_NOT_SUPPORTED)
 *   hang 1          every call sleeps while this is so
 *   lost1 1         GPU 1 fell off the bus
 *   xid0 79         the next event is this XID of GPU 0; given out once per value
 *
 * Handles are small integers: GPU i is i + 1, its MIG device m is 100 * (i + 1) + m + 1. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { OK = 0, INVALID = 2, UNSUPPORTED = 3, NOT_FOUND = 6, TOO_SMALL = 7, TIMEOUT = 10, LOST = 15 };
typedef unsigned long long u64;
typedef unsigned int u32;

static u64 value(const char *name, u64 otherwise) {
    const char *path = getenv("FAKE_NVML");
    FILE *file = path ? fopen(path, "r") : NULL;
    char found[128];
    u64 number, result = otherwise;
    while (file && fscanf(file, "%127s %llu", found, &number) == 2)
        if (!strcmp(found, name)) result = number;
    if (file) fclose(file);
    return result;
}
static u64 of(const char *name, long handle, u64 otherwise) {
    char full[128];
    snprintf(full, sizeof full, "%s%ld", name, handle > 100 ? handle / 100 - 1 : handle - 1);
    return value(full, otherwise);
}
static int begin(const char *call) {
    char full[128];
    while (value("hang", 0)) usleep(20000);
    snprintf(full, sizeof full, "fail:%s", call);
    return (int)value(full, OK);
}
#define BEGIN do { int failed = begin(__func__); if (failed) return failed; } while (0)

int nvmlInitWithFlags(u32 flags) { (void)flags; BEGIN; return OK; }
int nvmlInit_v2(void) { return nvmlInitWithFlags(0); }
int nvmlInit(void) { return nvmlInitWithFlags(0); }
int nvmlDeviceGetCount(u32 *count) { BEGIN; *count = (u32)value("devices", 1); return OK; }
int nvmlSystemGetCudaDriverVersion_v2(int *version) { BEGIN; *version = 13000; return OK; }
int nvmlDeviceGetCudaComputeCapability(void *handle, int *major, int *minor) {
    BEGIN;
    u64 both = value("capability", 80);
    (void)handle;
    *major = (int)(both / 10);
    *minor = (int)(both % 10);
    return OK;
}
int nvmlDeviceGetP2PStatus(void *one, void *other, u32 index, u32 *status) { (void)one; (void)other; (void)index; BEGIN; *status = value("nvlink", 0) ? 0 : 3; return OK; }
int nvmlShutdown(void) { return OK; }
const char *nvmlErrorString(int code) { return code == 9 ? "Driver Not Loaded" : code == 15 ? "GPU is lost" : "an error"; }
int nvmlSystemGetDriverVersion(char *text, u32 size) { BEGIN; snprintf(text, size, "%llu.1", value("driver", 590)); return OK; }
int nvmlDeviceGetCount_v2(u32 *count) { BEGIN; *count = (u32)value("devices", 1); return OK; }
int nvmlDeviceGetHandleByIndex_v2(u32 index, void **handle) { BEGIN; *handle = (void *)(long)(index + 1); return OK; }
int nvmlDeviceGetIndex(void *handle, u32 *index) { BEGIN; if (of("lost", (long)handle, 0)) return LOST; *index = (u32)((long)handle - 1); return OK; }
int nvmlDeviceGetName(void *handle, char *text, u32 size) { BEGIN; if (of("lost", (long)handle, 0)) return LOST; snprintf(text, size, "%s", getenv("FAKE_GPU") ? getenv("FAKE_GPU") : "NVIDIA A100-SXM4-80GB"); return OK; }
int nvmlDeviceGetUUID(void *handle, char *text, u32 size) { BEGIN; snprintf(text, size, "GPU-%ld", (long)handle); return OK; }
int nvmlDeviceGetUtilizationRates(void *handle, u32 *rates) {
    BEGIN;
    if ((long)handle > 100 || of("mig", (long)handle, 0)) return UNSUPPORTED; /* a GPU in MIG mode has no rates */
    rates[0] = (u32)of("util", (long)handle, 40);
    rates[1] = (u32)of("util_mem", (long)handle, 20);
    return OK;
}
int nvmlDeviceGetMemoryInfo(void *handle, u64 *memory) {
    BEGIN;
    u64 share = (long)handle > 100 ? 4 : 1;
    memory[0] = of("mem_total", (long)handle, 80ull << 30) / share;
    memory[2] = of("mem_used", (long)handle, 60ull << 30) / share;
    memory[1] = memory[0] - memory[2];
    return OK;
}
struct memory { u32 version; u64 total, reserved, free, used; };
int nvmlDeviceGetMemoryInfo_v2(void *handle, struct memory *memory) {
    u64 plain[3];
    int said = nvmlDeviceGetMemoryInfo(handle, plain);
    if (said) return said;
    memory->total = plain[0];
    memory->reserved = of("mem_reserved", (long)handle, 0);
    memory->free = plain[1];
    memory->used = plain[2] - memory->reserved; /* version 1 counts what the driver keeps as used */
    return OK;
}
#define NUMBER(call, type, name, otherwise) \
    int call(void *handle, type *out) { BEGIN; *out = (type)of(name, (long)handle, otherwise); return OK; }
NUMBER(nvmlDeviceGetPowerUsage, u32, "power", 250000)
NUMBER(nvmlDeviceGetEnforcedPowerLimit, u32, "power_limit", 400000)
NUMBER(nvmlDeviceGetTotalEnergyConsumption, u64, "energy", 3600000)
NUMBER(nvmlDeviceGetCurrentClocksEventReasons, u64, "reasons", 0)
NUMBER(nvmlDeviceGetPcieReplayCounter, u32, "replays", 0)
NUMBER(nvmlDeviceGetMaxMigDeviceCount, u32, "mig_slots", 7)
struct temperature { u32 version, sensor; int celsius; };
int nvmlDeviceGetTemperatureV(void *handle, struct temperature *out) { BEGIN; out->celsius = (int)of("heat", (long)handle, 55); return OK; }
int nvmlDeviceGetTemperature(void *handle, u32 sensor, u32 *out) { (void)sensor; BEGIN; *out = (u32)of("heat", (long)handle, 55) + 1; return OK; }
int nvmlDeviceGetTemperatureThreshold(void *handle, u32 kind, u32 *out) { (void)handle; BEGIN; *out = kind == 0 ? 92 : 89; return OK; }
int nvmlDeviceGetClockInfo(void *handle, u32 kind, u32 *mhz) { BEGIN; *mhz = kind == 1 ? (u32)of("clock", (long)handle, 1410) : 1593; return OK; }
int nvmlDeviceGetMaxClockInfo(void *handle, u32 kind, u32 *mhz) { (void)handle; BEGIN; *mhz = kind == 1 ? 1410 : 1593; return OK; }
int nvmlDeviceGetViolationStatus(void *handle, u32 policy, u64 *out) {
    char name[32];
    BEGIN;
    snprintf(name, sizeof name, "violation_%u_", policy);
    out[0] = 1;
    out[1] = of(name, (long)handle, 0);
    return OK;
}
int nvmlDeviceGetTotalEccErrors(void *handle, u32 type, u32 counter, u64 *out) {
    (void)counter;
    BEGIN;
    *out = of(type ? "ecc_uncorrected" : "ecc_corrected", (long)handle, 0);
    return OK;
}
int nvmlDeviceGetRemappedRows(void *handle, u32 *corrected, u32 *uncorrected, u32 *pending, u32 *failed) {
    BEGIN;
    *corrected = (u32)of("remapped", (long)handle, 0);
    *uncorrected = 0;
    *pending = (u32)of("remap_pending", (long)handle, 0);
    *failed = (u32)of("remap_failed", (long)handle, 0);
    return OK;
}
int nvmlDeviceGetPcieThroughput(void *handle, u32 counter, u32 *kib) { (void)handle; BEGIN; *kib = counter ? 2048 : 1024; return OK; }
int nvmlDeviceGetMigMode(void *handle, u32 *now, u32 *pending) { BEGIN; *now = *pending = of("mig", (long)handle, 0) > 0; return OK; }
int nvmlDeviceGetMigDeviceHandleByIndex(void *handle, u32 index, void **out) {
    BEGIN;
    if (index >= of("mig", (long)handle, 0)) return NOT_FOUND;
    *out = (void *)(100 * (long)handle + index + 1);
    return OK;
}
struct process { u32 pid; u64 memory; u32 gpu_instance, compute_instance; };
int nvmlDeviceGetComputeRunningProcesses_v3(void *handle, u32 *count, struct process *out) {
    BEGIN;
    u32 there = (u32)of("processes", (long)handle, 1);
    if (*count < there) { *count = there; return TOO_SMALL; }
    for (u32 i = 0; i < there; i++) out[i] = (struct process){1000 + i, (u64)(i + 1) << 30, 0, 0};
    *count = there;
    return OK;
}
int nvmlEventSetCreate(void **set) { BEGIN; *set = (void *)1; return OK; }
int nvmlEventSetFree(void *set) { (void)set; return OK; }
int nvmlDeviceRegisterEvents(void *handle, u64 types, void *set) { (void)handle; (void)types; (void)set; BEGIN; return OK; }
struct event { void *device; u64 type, data; u32 gpu_instance, compute_instance; };
int nvmlEventSetWait_v2(void *set, struct event *out, u32 timeout_ms) {
    static u64 given[16];
    (void)set;
    (void)timeout_ms;
    BEGIN;
    for (long gpu = 0; gpu < 16; gpu++) {
        u64 xid = of("xid", gpu + 1, 0);
        if (xid && xid != given[gpu]) {
            given[gpu] = xid;
            *out = (struct event){(void *)(gpu + 1), 8, xid, 0, 0};
            return OK;
        }
    }
    return TIMEOUT;
}
