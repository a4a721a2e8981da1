"""The compose stack in real containers: up, ask, scale, kill, restart each service, down; and its hardening."""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import httpx
import openai
import pytest

from bench.features import first_and_second
from bench.hosts import Streams
from common import VERSION
from services.local.plan import ROOT
from tests import alloy
from tests.containers import BASE, ENV, composed, docker, no_engine
from tests.harness import wait_for
from tests.up import MODEL

needs_engine = pytest.mark.skipif(bool(no_engine()), reason=no_engine() or "never")


def config(*profiles: str, **env: str) -> dict:
    if not shutil.which("docker") or subprocess.run(["docker", "compose", "version"], capture_output=True, check=False).returncode:
        pytest.skip("docker compose is not installed")
    chosen = [part for profile in profiles for part in ("--profile", profile)]
    done = subprocess.run(["docker", "compose", *chosen, "config", "--format", "json"], cwd=ROOT, env=ENV | env,
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("accelerator", ["cpu", "cuda"])
def test_every_container_is_hardened(accelerator: str) -> None:
    services = config(ACCELERATOR=accelerator)["services"]
    assert set(services) == {"secrets", "nginx", "gateway", "worker", "jobs", "ledger", "gpu_exporter", "trainer",
                             "fetch", "redis", "redis-cache"}
    for name, service in services.items():
        assert service["user"] == "10001:10001", name
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service.get("pids_limit"), name
        assert not service.get("privileged"), name
        assert "docker.sock" not in json.dumps(service), name
        assert name == "secrets" or service.get("mem_limit"), name
        assert bool(service.get("ports")) == (name == "nginx"), name
    assert services["nginx"]["ports"][0]["host_ip"] == "127.0.0.1"
    assert all("edge" not in services[n]["networks"] for n in ("gateway", "worker", "jobs", "ledger", "gpu_exporter", "trainer", "redis", "redis-cache"))
    assert config()["networks"]["backend"]["internal"] is True


def test_the_next_gateway_is_the_gateway() -> None:
    services = config("restart")["services"]
    next_one = services["gateway-next"]
    assert next_one.pop("networks") == {"backend": {"aliases": ["gateway"]}}
    assert {name: value for name, value in (services["gateway"] | next_one).items() if name != "profiles"} == services["gateway"]


@pytest.mark.parametrize("accelerator", ["cpu", "cuda"])
def test_images_carry_the_release(accelerator: str) -> None:
    """After `git pull` compose finds no image of the new release, and makes it; the old one stays for a way back."""
    images = {service["image"] for service in config("restart", ACCELERATOR=accelerator)["services"].values()}
    assert {image.rpartition(":")[2] for image in images} == {VERSION}, images


def test_the_monitoring_profile_is_hardened_too() -> None:
    services = config("monitoring", "traces")["services"]
    watching = set(services) - set(config()["services"])
    assert watching == {"prometheus", "alertmanager", "grafana", "redis-exporter", "nginx-exporter", "loki", "alloy", "tempo"}
    for name in watching:
        service = services[name]
        # Docker's log files are root's; Alloy may read what it cannot own, and nothing else.
        assert (service["user"], service.get("cap_add")) == ("0:0", ["DAC_READ_SEARCH"]) if name == "alloy" else (
            not service["user"].startswith("0") and "cap_add" not in service), name
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service.get("mem_limit") and service.get("pids_limit"), name
        assert not service.get("ports") and not service.get("privileged"), name
        assert "docker.sock" not in json.dumps(service), name
        assert service["logging"]["options"]["labels"] == "com.docker.compose.service", name
        assert set(service["networks"]) == ({"backend", "edge"} if name == "alertmanager" else {"backend"}), name
    text = (ROOT / "compose.yaml").read_text()
    assert ":latest" not in text


@pytest.mark.parametrize("engine", ["trtllm", "sglang"])
def test_other_engines_are_hardened_too(engine: str) -> None:
    """Not run here: official images, and a GPU."""
    services = config(engine, ACCELERATOR="cuda")["services"]
    assert set(services) - set(config(ACCELERATOR="cuda")["services"]) == {engine, f"worker-{engine}"}
    for name in (engine, f"worker-{engine}"):
        service = services[name]
        assert service["user"] == "10001:10001"
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert service["mem_limit"] and service["pids_limit"]
        assert not service.get("ports")
        assert set(service["networks"]) == {"backend"}
        assert service["depends_on"]["fetch"]["condition"] == "service_completed_successfully"
    worker, command = services[f"worker-{engine}"]["environment"], services[engine]["command"]
    assert (worker["ENGINE"], worker["ENGINE_URL"], worker["PLACE"]) == (engine, f"http://{engine}:8000", "")
    assert worker["MODEL"] in command, "the name by which it is asked for is the one it was started with"
    assert worker["MAX_NUM_SEQS"] in command
    assert ":latest" not in services[engine]["image"]


def test_dashboards_are_open_on_loopback_only() -> None:
    def anonymous(**env: str) -> str:
        return config("monitoring", **env)["services"]["grafana"]["environment"]["GF_AUTH_ANONYMOUS_ENABLED"]

    assert "enabled = true" in (ROOT / "monitoring/grafana/grafana.ini").read_text()  # what holds while the variable is empty
    assert anonymous() == ""
    assert anonymous(HOST="0.0.0.0") == "false"
    environment = config("monitoring")["services"]["grafana"]["environment"]
    assert environment["GF_SECURITY_ADMIN_PASSWORD__FILE"] == "/run/secrets/monitor/admin_password"


def test_cuda_is_one_variable_and_pinned() -> None:
    worker = config(ACCELERATOR="cuda")["services"]["worker"]
    assert worker["build"]["target"] == "cuda"
    assert worker["build"]["args"]["CUDA_IMAGE"] == "vllm/vllm-openai:v0.32.0"
    assert worker["environment"]["MODEL"] == "mistralai/Mistral-7B-Instruct-v0.3"
    assert worker["deploy"]["resources"]["reservations"]["devices"][0]["capabilities"] == ["gpu"]
    llama = config(ACCELERATOR="cuda", MODEL="meta-llama/Meta-Llama-3-8B-Instruct")["services"]
    assert llama["worker"]["environment"]["MODEL"] == llama["fetch"]["environment"]["MODEL"]


@pytest.fixture(scope="module")
def containers() -> Iterator[openai.OpenAI]:
    """The stack, built and up; an SDK client with a fresh key."""
    with composed() as sdk:
        yield sdk


def ask(sdk: openai.OpenAI) -> str:
    """Which worker answers."""
    answer = sdk.chat.completions.with_raw_response.create(
        model=MODEL, messages=[{"role": "user", "content": "Say hi"}], max_tokens=4, temperature=0,
        extra_headers={"cache-control": "no-store"})
    assert answer.parse().choices[0].message.content
    return answer.headers["x-owngpt-worker"]


def ready() -> int:
    return int(httpx.get(BASE + "/ready").json().get("workers", {}).get("ready", 0))


@needs_engine
def test_it_answers(containers: openai.OpenAI) -> None:
    assert ask(containers)
    parts = containers.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "Say hi"}], max_tokens=8, stream=True)
    assert len(list(parts)) > 3


@needs_engine
def test_no_feature_needs_a_compiler_or_makes_a_client_wait_for_one(containers: openai.OpenAI) -> None:
    """One request with logprobs ended the engine for good (B16)."""
    assert docker("compose", "exec", "-T", "worker", "sh", "-c", "command -v g++ c++ clang++ || echo none").strip() == "none"
    before = ask(containers)
    took = first_and_second(containers, MODEL)
    assert ask(containers) == before, "the same engine"
    assert max(first - second for first, second in took.values()) < 5, took  # compiling takes 10 and more


@needs_engine
def test_only_nginx_is_reachable_and_users_are_not_root(containers: openai.OpenAI) -> None:
    published = docker("compose", "ps", "--format", "{{.Service}} {{.Ports}}")
    assert [line.split()[0] for line in published.splitlines() if "->" in line] == ["nginx"]
    for service in ("nginx", "gateway", "jobs", "ledger", "gpu_exporter", "trainer", "worker", "redis", "redis-cache"):
        assert docker("compose", "exec", "-T", service, "id", "-u").strip() == "10001"
    assert httpx.get(BASE + "/metrics").status_code == 404
    # nginx has one foot outside the internal network; nothing on that network reaches that foot.
    form = '{{(index .NetworkSettings.Networks "owngpt-test_edge").IPAddress}}'
    outside = docker("inspect", "-f", form, docker("compose", "ps", "-q", "nginx").strip()).strip()
    reach = f"import socket; socket.create_connection(('{outside}', 8080), timeout=2)"
    for service in ("gateway", "jobs", "ledger", "gpu_exporter", "trainer", "worker"):
        tried = subprocess.run(["docker", "compose", "exec", "-T", service, "python", "-c", reach],
                               cwd=ROOT, env=ENV, capture_output=True, text=True, check=False)
        assert "timed out" in tried.stderr or "unreachable" in tried.stderr, tried.stderr


@needs_engine
def test_unknown_hosts_are_dropped_where_names_are_configured(containers: openai.OpenAI) -> None:
    name = docker("compose", "run", "-d", "--no-deps", "-e", "SERVER_NAMES=a.example b.example", "nginx").strip()

    def curl(host: str) -> int:
        command = ["docker", "exec", name, "curl", "-s", "-o", "/dev/null", "-H", f"Host: {host}", "http://127.0.0.1:8080/health"]
        return subprocess.run(command, env=ENV, check=False).returncode

    try:
        wait_for(lambda: curl("a.example") == 0, "nginx up", 15)
        assert curl("b.example") == 0
        assert curl("evil.example") in (52, 56), "curl: empty reply, or reset by the server"
    finally:
        docker("rm", "-f", name)


@needs_engine
def test_nothing_is_computed_twice(containers: openai.OpenAI) -> None:
    """Answers and KV blocks reach redis-cache, with the rights that the containers have."""
    question = [{"role": "user", "content": "What is a whale? " * 60}]
    said = []

    def from_memory() -> bool:
        said.append(containers.chat.completions.with_raw_response.create(
            model=MODEL, messages=question, max_tokens=4, temperature=0))
        return said[-1].headers["x-owngpt-cache"] == "hit"

    assert not from_memory()
    wait_for(from_memory, "the same question answered from memory", 10)  # a cache that is slow once is no error
    assert said[0].parse().choices == said[-1].parse().choices
    read = "import urllib.request; print(urllib.request.urlopen('http://127.0.0.1:8000/metrics').read().decode())"

    def stored() -> bool:
        text = docker("compose", "exec", "-T", "worker", "python", "-c", read)
        return any("owngpt_kv_blocks_total" in line and 'result="stored"' in line for line in text.splitlines())

    wait_for(stored, "blocks stored", 20)


@needs_engine
def test_a_job_and_a_batch(containers: openai.OpenAI) -> None:
    """A tuned model for all workers, also for one that comes later, with the rights that the containers have."""
    rows = (ROOT / "examples/owngpt-qa.jsonl").read_text().splitlines(keepends=True)[:20]
    file = containers.files.create(file=("rows.jsonl", "".join(rows).encode()), purpose="fine-tune")
    job = containers.fine_tuning.jobs.create(model=MODEL, training_file=file.id, seed=1, suffix="boxed", method={
        "type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 1}}})
    print("\ntraining in a container (a minute)", flush=True)
    wait_for(lambda: containers.fine_tuning.jobs.retrieve(job.id).status in ("succeeded", "failed"), "the job's end", 400)
    job = containers.fine_tuning.jobs.retrieve(job.id)
    assert job.status == "succeeded", [e.message for e in containers.fine_tuning.jobs.list_events(job.id)]
    requests = "".join(json.dumps({
        "custom_id": str(n), "method": "POST", "url": "/v1/chat/completions", "body": {
            "model": job.fine_tuned_model, "messages": [{"role": "user", "content": f"{n}?"}], "max_tokens": 4}}) + "\n"
        for n in range(10))
    file = containers.files.create(file=("batch.jsonl", requests.encode()), purpose="batch")
    batch = containers.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
    wait_for(lambda: containers.batches.retrieve(batch.id).status in ("completed", "failed"), "the batch's end", 120)
    batch = containers.batches.retrieve(batch.id)
    assert batch.request_counts.completed == 10, batch
    assert len(containers.files.content(batch.output_file_id).text.splitlines()) == 10


def status(sdk: openai.OpenAI) -> dict:
    answer = httpx.get(BASE + "/v1/status", headers={"authorization": f"Bearer {sdk.api_key}"})
    assert answer.status_code == 200, answer.text
    return answer.json()


@needs_engine
def test_the_console_and_the_status(containers: openai.OpenAI) -> None:
    page = httpx.get(BASE + "/")
    assert "<title>OwnGPT</title>" in page.text
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert httpx.get(BASE + "/assets/main.js").headers["content-type"].startswith("text/javascript")
    assert httpx.get(BASE + "/assets/../nginx.conf.template").status_code == 404
    wait_for(lambda: status(containers)["host"], "the exporter heard", 40)
    now = status(containers)
    assert [worker["state"] for worker in now["workers"]] == ["ready"]
    assert now["host"]["memory_total_bytes"] > 1e9
    grafana = httpx.get(BASE + "/grafana/")
    assert grafana.status_code == 503
    assert "--profile monitoring" in grafana.json()["error"]["message"]


@needs_engine
@pytest.mark.skipif("PROMETHEUS_IMAGE" not in os.environ, reason="no image registry: PROMETHEUS_IMAGE and its like name no stand-ins")
def test_scaled_one_is_killed_nothing_fails_and_monitoring_tells(containers: openai.OpenAI) -> None:
    """Prometheus, Alertmanager and the exporters in containers. Grafana, Loki, Alloy and Tempo need a registry."""
    print("\nscaling to two workers, with monitoring", flush=True)
    docker("compose", "--profile", "monitoring", "up", "-d", "prometheus", "alertmanager", "redis-exporter", "nginx-exporter")
    docker("compose", "up", "-d", "--wait", "--scale", "worker=2")
    wait_for(lambda: ready() == 2, "two workers", 60)
    assert len({ask(containers) for _ in range(30)}) == 2
    ask_it = "import sys, urllib.request; print(urllib.request.urlopen('http://prometheus:9090/api/v1/' + sys.argv[1]).read().decode())"

    def prometheus(path: str) -> dict:
        return json.loads(docker("compose", "exec", "-T", "ledger", "python", "-c", ask_it, path))["data"]

    def down() -> list[str]:
        targets = [target["labels"] for target in prometheus("targets")["activeTargets"] if target["health"] == "up"]
        seen = {labels["instance"] if labels["job"] == "redis" else labels["job"] for labels in targets}
        return sorted({"gateway", "worker", "jobs", "ledger", "trainer", "gpu_exporter", "nginx", "redis", "redis-cache",
                       "prometheus"} - seen)

    try:
        wait_for(lambda: down() == [], "every job up", 60)
        docker("kill", "--signal", "KILL", docker("compose", "ps", "-q", "worker").split()[0])
        for _ in range(10):
            assert ask(containers)
        wait_for(lambda: ready() == 1, "one worker left", 10)
        wait_for(lambda: "WorkerLost" in [alert["name"] for alert in status(containers)["alerts"] or []], "WorkerLost in the status", 60)

        def told() -> str:
            return docker("compose", "logs", "--no-log-prefix", "ledger")

        wait_for(lambda: '"alert":"WorkerLost"' in told(), "Alertmanager telling the ledger", 60)
    finally:
        docker("compose", "--profile", "monitoring", "rm", "-sf", "prometheus", "alertmanager", "redis-exporter", "nginx-exporter")
        docker("compose", "up", "-d", "--wait", "--scale", "worker=1")


@needs_engine
def test_lines_of_containers_get_the_labels_alloy_is_told_to_give(containers: openai.OpenAI) -> None:
    """Docker's own log files of these containers, through the stages of config.alloy."""
    worker = ask(containers)
    for service, events in (("worker", {"request"}), ("gateway", {"gateway up"}), ("ledger", {"ledger up"})):
        path = docker("inspect", "-f", "{{.LogPath}}", docker("compose", "ps", "-q", service).split()[0]).strip()
        try:
            lines = open(path).read().splitlines()
        except PermissionError:
            pytest.skip(f"{path} is root's")
        entries = [alloy.carry_out(line) for line in lines]
        assert entries and None not in entries
        assert {entry.labels["service"] for entry in entries} == {service}
        assert {label for entry in entries for label in entry.labels} <= {"service", "level"}
        said = [json.loads(entry.line) for entry in entries if entry.line.startswith("{")]
        assert events <= {line["event"] for line in said}
    requests = [entry for entry in map(alloy.carry_out, open(docker(
        "inspect", "-f", "{{.LogPath}}", docker("compose", "ps", "-q", "worker").split()[0]).strip())) if '"event":"request"' in entry.line]
    assert all(entry.metadata["request_id"] and entry.metadata["worker"] for entry in requests)
    assert worker in {entry.metadata["worker"] for entry in requests}


@needs_engine
def test_each_service_survives_a_restart(containers: openai.OpenAI) -> None:
    for service in ("redis-cache", "redis", "gateway", "jobs", "ledger", "gpu_exporter", "trainer", "nginx"):  # workers: below
        print(f"\nrestarting {service}", flush=True)
        docker("compose", "restart", "--timeout", "20", service)
        wait_for(lambda: ready() == 1, f"ready after {service}", 180)
        time.sleep(0.5)
        assert ask(containers), service


def made(command: str, **env: str) -> None:
    done = subprocess.run(["make", "-s", command], cwd=ROOT, env=ENV | env, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]


def ids() -> dict[str, str]:
    """The container of each service that runs; of several one."""
    lines = docker("compose", "ps", "--format", "{{.Service}} {{.ID}}").splitlines()
    return dict(line.split() for line in lines)


def asked(sdk: openai.OpenAI) -> Streams:
    """A client that streams again and again. On two cores a busy engine leaves one that starts, in a group of its own, a quarter of a core."""
    return Streams(SimpleNamespace(sdk=sdk), MODEL, 1, pause_s=2.0)  # type: ignore[arg-type]


@needs_engine
def test_all_anew_while_it_serves(containers: openai.OpenAI) -> None:
    """The gateway's container was away for a second or two."""
    before = ids()
    with asked(containers) as load:
        made("restart-compose")
    assert (load.failures, load.cut) == ([], 0)
    assert len(load.took_s) > 5
    after = ids()
    assert {name for name in before if before[name] != after.get(name)} == {"gateway", "worker"}
    assert set(after) == set(before)


@needs_engine
def test_models_yaml_is_applied_while_it_serves(containers: openai.OpenAI, tmp_path: Path) -> None:
    """What is new comes up beside the old, takes over, the old drains; nobody else is touched."""
    made_here = [ROOT / "models.compose.yaml", ROOT / "models.wanted"]
    if any(file.exists() for file in made_here):
        pytest.skip("this checkout has a models.compose.yaml of its own")
    file = tmp_path / "models.yaml"
    file.write_text(f"models:\n- {{name: {MODEL}, max_tokens: 4096}}\n")
    before = ids()
    try:
        ENV["COMPOSE_FILE"] = f"compose.yaml:{made_here[0].name}"
        with asked(containers) as load:
            made("apply-compose", MODELS_FILE=str(file), GPUS="0")
        assert (load.failures, load.cut) == ([], 0)
        after = ids()
        assert [name.rpartition("-")[0] for name in after if name.startswith("worker")] == [f"worker-{MODEL}-1"]
        assert {name for name in before if before[name] != after.get(name)} == {"worker", "trainer"}
        models = {model.id: model for model in containers.models.list()}
        assert models[MODEL].max_model_len == 4096  # type: ignore[attr-defined]
    finally:
        del ENV["COMPOSE_FILE"]
        for one in made_here:
            one.unlink(missing_ok=True)


@needs_engine
def test_a_worker_that_cannot_start_ends_the_waiting(containers: openai.OpenAI) -> None:
    """`up --wait` waited for half an hour, and said nothing."""
    began = time.monotonic()
    done = subprocess.run(["docker", "compose", "up", "-d", "--wait", "worker"], cwd=ROOT, env=ENV | {"ENGINE_ARGS": "--no-such-flag"},
                          capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode != 0
    assert "unhealthy" in done.stderr, done.stderr[-500:]
    assert time.monotonic() - began < 120
    assert "unrecognized arguments: --no-such-flag" in docker("compose", "logs", "worker")
