"""compose.yaml and `make up` start one set of programs: every setting of one is in the other, or stands here with a reason."""

import re
from hashlib import sha256
from pathlib import Path

import pytest
import yaml
from pydantic_core import PydanticUndefined

from gateway.settings import Settings
from services.gpu_exporter.settings import ExporterSettings
from services.jobs.settings import JobsSettings
from services.ledger.settings import LedgerSettings
from services.local import configs, programs
from services.local.plan import ROOT, Dials, Ports
from services.local.workers import change, wanted
from services.secrets.__main__ import ACL, CACHE_ACL, make
from services.trainer.settings import TrainerSettings
from services.worker.settings import WorkerSettings

SETTINGS = {"gateway": Settings, "worker": WorkerSettings, "jobs": JobsSettings, "ledger": LedgerSettings,
            "trainer": TrainerSettings, "gpu_exporter": ExporterSettings}

ONLY_COMPOSE = {
    "HOME": "a read-only container has no other place to write", "HF_HOME": "the hub volume; locally the user's own cache",
    "HF_HUB_OFFLINE": "workers have no way out; locally vLLM is told so for a model folder",
    "ENGINE_HOST": "the container's network; locally the loopback, which is the default",
    "TRAINER_METRICS_HOST": "as ENGINE_HOST", "NVIDIA_DRIVER_CAPABILITIES": "of NVIDIA's container toolkit",
    "USER": "a container's user has no name",
    "XDG_CACHE_HOME": "a volume; locally the user's own cache", "TRITON_CACHE_DIR": "as XDG_CACHE_HOME",
    "TORCHINDUCTOR_CACHE_DIR": "as XDG_CACHE_HOME", "ALIVE_FILE": "of a container's health check",
    "GATEWAY_PROCESSES": "python -m gateway reads it from the environment in both", "ACCELERATOR": "in the image",
}
ONLY_LOCAL = {
    "PYTHONPATH": "run from the folder", "PYTHONUNBUFFERED": "in the images",
    "WORKER_NAME": "several on one host; a container's name is its own", "ADVERTISE_HOST": "several on one host",
    "ENGINE_PORT": "several on one host", "ACCELERATOR": "in the images",
    "CACHE_REDIS_URL": "shared by all programs here; only gateway and workers read it",
    "REDIS_URL": "shared by all programs here; the exporter does not read it",
}
NOT_A_DIAL_OF_MAKE_UP = {
    "MODELS_DIR": "MODEL is a folder there",
    "HF_TOKEN": "the hub library reads it itself", "WORKER_MEMORY": "a container's limit", "REDIS_MEMORY": "a container's limit",
    "CACHE_MEMORY": "a container's limit", "TRAINER_MEMORY": "a container's limit", "WORKER_SHM": "a container's limit",
    "ALERT_WEBHOOK_URL": "Alertmanager comes with the containers", "TRACES": "Tempo comes with the containers; OTLP_TRACES_ENDPOINT works",
    **dict.fromkeys(("OTHER_ENGINE_GPU", "TRTLLM_SEQUENCES", "TRTLLM_MEMORY", "SGLANG_SEQUENCES", "SGLANG_MEMORY"),
                    "these engines come as containers"),
    "DOCKER_ROOT": "Docker's", "BACKEND_PREFIX": "Docker's network", "GATEWAY_PROCESSES": "python -m gateway reads it",
}


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> dict[str, programs.Program]:
    """The programs of `make up`, by service."""
    state = tmp_path_factory.mktemp("state")
    dials = Dials(state)
    make(dials.secrets)
    found = programs.programs(dials, Ports.take(iter(range(9000, 9100)), 1), change([], wanted(dials), iter([9050])).new)
    return {program.name.removesuffix("-1"): program for program in found}


def compose() -> dict[str, dict]:
    document = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
    for who in ("worker", "trainer", "gpu_exporter"):
        kinds = yaml.safe_load((ROOT / f"services/{who}/hardware.yaml").read_text())["services"]
        document[who]["environment"] = {**kinds["cpu"].get("environment", {}), **document[who].get("environment", {})}
    return document


@pytest.mark.parametrize("service", sorted(SETTINGS))
def test_every_setting_of_one_is_in_the_other(local: dict[str, programs.Program], service: str) -> None:
    there, here = set(compose()[service].get("environment", {})), set(local[service].env)
    fields = {name.upper() for name in SETTINGS[service].model_fields}
    # What compose takes from .env, `make up` takes from the environment: programs inherit it.
    dialled = {name for name, value in compose()[service].get("environment", {}).items()
               if re.fullmatch(r"\$\{([A-Z_]+)[:}].*", str(value)) and name in fields}
    assert {n for n in there - here - dialled if n not in ONLY_COMPOSE and not n.startswith("OTLP")} == set()
    assert {n for n in here - there if n not in ONLY_LOCAL} == set()


def test_the_lists_of_reasons_hold_nothing_idle(local: dict[str, programs.Program]) -> None:
    services = compose()
    assert set(ONLY_COMPOSE) <= {n for s in SETTINGS for n in services[s].get("environment", {})} | {
        "NVIDIA_DRIVER_CAPABILITIES", "ACCELERATOR"}
    assert set(ONLY_LOCAL) <= {n for s in SETTINGS for n in local[s].env}


@pytest.mark.parametrize("service", sorted(SETTINGS))
def test_both_have_the_same_defaults(service: str) -> None:
    """A dial that nobody sets means the same in both: compose's default is the program's own."""
    for name, value in compose()[service].get("environment", {}).items():
        field = SETTINGS[service].model_fields.get(name.lower())
        found = re.fullmatch(r"\$\{[A-Z_]+:-(.*)\}", str(value))
        if field is None or found is None or field.default is PydanticUndefined or name in ("MODEL", "KV_TIER"):
            continue
        said = type(field.default)(found[1]) if isinstance(field.default, int | float) else found[1]
        assert said == (field.default if field.default is not None else ""), f"{service}: {name}"


def test_env_example_says_where_a_gpu_has_another_default() -> None:
    """Above each dial whose default is another with cuda: `Default with cuda: 48g.`, or `redis with ACCELERATOR=cpu, off with cuda.`"""
    lines = (ROOT / ".env.example").read_text().splitlines()
    seen = 0
    for who in ("worker", "trainer", "gpu_exporter"):
        kinds = (ROOT / f"services/{who}/hardware.yaml").read_text().split("\n  cuda:")
        cpu, cuda = (dict(re.findall(r"\$\{([A-Z_]+):-([^}]*)\}", kind)) for kind in kinds)
        for name, default in cuda.items():
            if cpu.get(name, default) == default:
                continue
            at = lines.index(f"#{name}={cpu[name]}")
            said = next(line for line in reversed(lines[:at]) if "cuda" in line)
            assert re.search(rf"with cuda: {re.escape(default)}\.|{re.escape(default)} with cuda", said), f"{name}: {said}"
            assert lines.index(said) >= at - 2, name
            seen += 1
    assert seen >= 6


def test_every_dial_reaches_make_up() -> None:
    """Each name in .env.example is a setting of a program, is read by the launcher, or has a reason here."""
    offered = set(re.findall(r"^#?\s?([A-Z][A-Z0-9_]+)=", (ROOT / ".env.example").read_text(), re.M))
    fields = {name.upper() for kind in SETTINGS.values() for name in kind.model_fields}
    launcher = "".join(path.read_text() for path in (ROOT / "services/local").glob("*.py"))
    read = set(re.findall(r"environ\.get\([\"']([A-Z_]+)[\"']", launcher))
    images = {name for name in offered if name.endswith("_IMAGE")}
    assert offered - fields - read - images - NOT_A_DIAL_OF_MAKE_UP.keys() == set()


def test_nginx_is_rendered_with_the_same_names_in_both() -> None:
    wanted = set(re.findall(r"\$\{([A-Z_]+)\}", (ROOT / "nginx/nginx.conf.template").read_text())) - {"UPPER_CASE"}
    command = (ROOT / "nginx/entrypoint.sh").read_text().split("envsubst '")[1].split("'")[0]
    by_shell = set(re.findall(r"\$\{([A-Z_]+)\}", command))
    by_launcher = set(re.findall(r'^        "([A-Z_]+)":', Path(configs.__file__).read_text(), re.M))
    assert wanted <= by_shell
    assert wanted <= by_launcher


def test_new_rights_start_both_redis_servers_anew() -> None:
    """They read their ACL at the start only; without a change of theirs, an upgrade would leave them on the old one."""
    digest = sha256((ACL + CACHE_ACL).encode()).hexdigest()[:12]
    assert [compose()[name]["labels"]["owngpt.acl"] for name in ("redis", "redis-cache")] == [digest] * 2


def test_one_redis_configuration(local: dict[str, programs.Program]) -> None:
    for name in ("redis", "redis-cache"):
        there, here = " ".join(compose()[name]["command"]), " ".join(local[name].command)
        for flag in ("--aclfile", "--maxmemory", "--dir"):
            assert flag in there
            assert flag in here
        assert re.search(r":-(\w+)\}", there)[1] in here, "the same memory"  # type: ignore[index]
