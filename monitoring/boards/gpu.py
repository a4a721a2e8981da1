"""What do the GPUs do, and are they well?"""

from monitoring.panels import Board, Panel, q

BOARD = Board(
    "owngpt-gpu", "OwnGPT · GPU", "Utilisation, memory, power, heat, health, from services/gpu_exporter.",
    {
        "Busy?": (
            Panel("A kernel ran", "timeseries", "percentunit",
                  "Share of time in which any kernel ran. 100 % says nothing about how full it ran.",
                  q("gpu_utilization_ratio", "GPU {{gpu}}")),
            Panel("Memory controller busy", "timeseries", "percentunit", "Decoding is bound by this.",
                  q("gpu_memory_controller_utilization_ratio", "GPU {{gpu}}")),
            Panel("Clock, share of the highest", "timeseries", "percentunit", "Below 1 under load: held down, see throttling.",
                  q('gpu_clock_hertz{clock="sm"} / on (gpu, clock) gpu_clock_max_hertz', "GPU {{gpu}}")),
            Panel("Memory in use", "timeseries", "bytes", "vLLM takes GPU_MEMORY_UTILIZATION of it at the start.",
                  (('gpu_memory_used_bytes{mig=""}', "used, GPU {{gpu}}"),
                   ('gpu_memory_total_bytes{mig=""}', "there is, GPU {{gpu}}"))),
            Panel("Memory by MIG device", "timeseries", "bytes", "Parts of a GPU that is divided.",
                  q('gpu_memory_used_bytes{mig!=""}', "GPU {{gpu}} part {{mig}}")),
            Panel("Memory by process", "timeseries", "bytes", "The largest ones.",
                  q("gpu_process_memory_bytes", "GPU {{gpu}} pid {{pid}}"), stacked=True),
        ),
        "Power and heat": (
            Panel("Power", "timeseries", "watt", "Drawn, and the limit.",
                  (("gpu_power_watts", "GPU {{gpu}}"), ("gpu_power_limit_watts", "limit, GPU {{gpu}}"))),
            Panel("Temperature", "timeseries", "celsius", "And where the GPU slows itself down.",
                  (("gpu_temperature_celsius", "GPU {{gpu}}"),
                   ('gpu_temperature_threshold_celsius{threshold="slowdown"}', "slowdown, GPU {{gpu}}"))),
            Panel("Held down by reason", "timeseries", "percentunit", "Share of time. thermal: clean the fans.",
                  q("rate(gpu_throttle_seconds_total[$__rate_interval])", "GPU {{gpu}} {{reason}}"), stacked=True),
            Panel("Energy per 1,000 tokens", "stat", "joule", "Of all GPUs together, over generated tokens.",
                  q("1000 * sum(rate(gpu_energy_joules_total[$__rate_interval])) / "
                    "(sum(rate(vllm:generation_tokens_total[$__rate_interval])) > 0)")),
            Panel("Held down now", "table", "short", "Reasons the driver gives at this moment.",
                  q('gpu_throttle_active{reason!="idle"}')),
        ),
        "Health": (
            Panel("ECC errors", "timeseries", "short", "Uncorrected ones: answers may be wrong, replace the GPU.",
                  q("increase(gpu_ecc_errors_total[$__rate_interval])", "GPU {{gpu}} {{type}}")),
            Panel("Memory rows", "table", "short", "Replaced by spare ones; a replacement that waits for a reset; none left.",
                  q('{__name__=~"gpu_remapped_rows|gpu_row_remap_.*"}')),
            Panel("XID errors", "table", "short", "By code, since the exporter started. No row: none.",
                  q("gpu_xid_errors_total or vector(0)")),
            Panel("PCIe", "timeseries", "Bps", "Traffic, samples of 20 ms.",
                  q("gpu_pcie_bytes_per_second", "GPU {{gpu}} {{direction}}")),
            Panel("PCIe replays", "timeseries", "ops", "More than none: a bad slot or riser.",
                  q("rate(gpu_pcie_replays_total[$__rate_interval])", "GPU {{gpu}}")),
            Panel("Driver", "stat", "short", "1 while it answers.", q("gpu_nvml_up"), good_above=1),
            Panel("Sample age", "stat", "s", "Grows while the driver hangs.", q("gpu_sample_age_seconds"), good_below=30),
            Panel("Failed calls", "stat", "ops", "Calls to the driver that failed, per second.",
                  q("sum(rate(gpu_nvml_errors_total[$__rate_interval])) or vector(0)"), good_below=0.1),
        ),
    },
    needs="an NVIDIA GPU",
)  # fmt: skip
