"""`make quantize-compose`: what it tells the container, what it refuses, and the whole way in a real one."""

import json
import os
import shlex
import subprocess
from pathlib import Path

import pytest

from common import checkpoint
from services.local import catalog, compose, model
from services.local.errors import UserError
from services.local.plan import ROOT
from services.tools.quantize import containers
from tests.containers import ENV, docker, no_engine
from tests.test_compose import VERSION, config
from tests.test_tools import tuned_on

needs_engine = pytest.mark.skipif(bool(no_engine()), reason=no_engine() or "never")


@pytest.mark.parametrize("accelerator", ["cpu", "cuda"])
def test_its_container_is_hardened_and_has_no_network(accelerator: str) -> None:
    service = config("tools", ACCELERATOR=accelerator)["services"]["quantize"]
    assert (service["user"], service["read_only"], service["cap_drop"]) == ("10001:10001", True, ["ALL"])
    assert service["security_opt"] == ["no-new-privileges:true"] and service["mem_limit"] and service["pids_limit"]
    assert (service["network_mode"], service.get("ports")) == ("none", None)
    mounts = {mount["target"]: mount.get("read_only", False) for mount in service["volumes"]}
    assert mounts == {"/hub": True, "/models/own": False}
    assert (service["image"], "deploy" in service) == (f"owngpt-tools-{accelerator}:{VERSION}", accelerator == "cuda")


@pytest.mark.parametrize(("said", "found"), [
    ("/models/smollm2-135m-instruct", "bundled"), ("/models/own/mine", "/somewhere/mine"), ("org/model@v1", "org/model@v1"), ("", ""),
])
def test_models_as_containers_say_them(said: str, found: str) -> None:
    assert containers.on_this_host(said, Path("/somewhere")) == found


class Docker:
    """A docker that writes down how it was called: what it answers is of the tests' own making."""

    def __init__(self, folder: Path, own: Path) -> None:
        self.folder, self.own = folder, own
        folder.mkdir()
        self.answers()

    def answers(self, *, running: str = "", status: int = 0, gpus: bool = False, **worker: str) -> None:
        services: dict = {"quantize": {"volumes": [{"target": "/models/own", "source": str(self.own)}]} | ({"deploy": {}} if gpus else {})}
        if worker.get("MODEL") != "":
            services["worker"] = {"environment": {"MODEL": "/models/smollm2-135m-instruct"} | worker}
        (self.folder / "config").write_text(json.dumps({"services": services}))
        (self.folder / "docker").write_text(
            f"#!/bin/sh\nprintf '%s\\n' \"$*\" >>{self.folder}/calls\n"
            f"case \"$*\" in *' config '*) cat {self.folder}/config ;; *' ps '*) printf '%b' '{running}' ;; *quantize) exit {status} ;; esac\n"
        )
        (self.folder / "docker").chmod(0o755)

    @property
    def runs(self) -> list[str]:
        calls = self.folder / "calls"
        return [line for line in calls.read_text().splitlines() if " run " in line] if calls.exists() else []


@pytest.fixture
def scripted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Docker:
    found = Docker(tmp_path / "bin", tmp_path / "models")
    monkeypatch.setenv("PATH", f"{found.folder}:{os.environ['PATH']}")
    monkeypatch.setenv("MODELS_FILE", str(tmp_path / "models.yaml"))
    return found


def copy(tmp_path: Path, name: str) -> None:
    """What the container would have left."""
    (tmp_path / "models" / name).mkdir(parents=True)
    (tmp_path / "models" / name / "config.json").write_text("{}")


def told(run: str) -> dict:
    """The entry that the container was given."""
    return json.loads(run.split("ENTRY=")[1].split(" -e ")[0])


def test_the_default_is_what_compose_serves(tmp_path: Path, scripted: Docker) -> None:
    copy(tmp_path, "smollm2-135m-instruct-w8a8")
    containers.quantize("", "w8a8", "", 0.05)
    (run,) = scripted.runs
    assert told(run) == {"name": "smollm2-135m-instruct", "source": "/models/smollm2-135m-instruct"}
    assert "METHOD=w8a8" in run and "MAX_PERPLEXITY_LOSS=0.05" in run and run.endswith("quantize")
    _, new = catalog.read(tmp_path / "models.yaml").models
    assert (new.name, new.source, new.adapters) == ("smollm2-135m-instruct-w8a8", str(tmp_path / "models/smollm2-135m-instruct-w8a8"), False)


def test_what_env_says_of_the_model_goes_into_models_yaml(tmp_path: Path, scripted: Docker) -> None:
    scripted.answers(MODEL="org/M", MODEL_REVISION="v2", SERVED_MODEL_NAME="chat", TENSOR_PARALLEL_SIZE="2")
    copy(tmp_path, "chat-awq")
    containers.quantize("", "awq", "", 0.05)
    first, new = catalog.read(tmp_path / "models.yaml").models
    assert (first.name, first.source, first.gpus) == ("chat", "org/M@v2", 2)
    assert (new.name, new.gpus) == ("chat-awq", 2)


def test_the_first_of_models_yaml_is_the_default_where_there_is_one(tmp_path: Path, scripted: Docker) -> None:
    scripted.answers(MODEL="")
    with pytest.raises(UserError, match=r"neither models\.yaml nor compose\.yaml serves one"):
        containers.quantize("", "awq", "", 0.05)
    (tmp_path / "models.yaml").write_text("models: [{name: mine, source: org/M}]\n")
    copy(tmp_path, "mine-awq")
    containers.quantize("", "awq", "", 0.05)
    assert scripted.runs[0] == "compose run --rm fetch org/M"


def test_a_hub_model_is_brought_first_and_rows_are_lent_for_as_long_as_it_takes(tmp_path: Path, scripted: Docker) -> None:
    copy(tmp_path, "m-gptq")
    (tmp_path / "rows.jsonl").write_text("{}\n")
    containers.quantize("org/M@v1", "gptq", str(tmp_path / "rows.jsonl"), 0.1)
    fetched, run = scripted.runs
    assert fetched == "compose run --rm fetch org/M@v1"
    assert told(run) == {"name": "m", "source": "org/M@v1"}
    lent, inside, _ = run.split(" -v ")[1].split(" ")[0].split(":")
    assert (inside, f"DATA={inside}" in run, Path(lent).exists()) == ("/rows.jsonl", True, False)
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["m-gptq"]
    assert f"--user {'10001:10001' if os.geteuid() == 0 else f'{os.getuid()}:{os.getgid()}'}" in run


def test_what_failed_is_not_registered(tmp_path: Path, scripted: Docker) -> None:
    for status, said in ((1, "see above"), (137, "WORKER_MEMORY")):
        scripted.answers(status=status)
        with pytest.raises(UserError, match=f"No smollm2-135m-instruct-awq was registered; .*{said}"):
            containers.quantize("bundled", "awq", "", 0.05)
    assert not (tmp_path / "models.yaml").exists()


def test_models_dir_may_be_a_link(tmp_path: Path, scripted: Docker) -> None:
    """models.yaml's folders are read with links followed; so is MODELS_DIR."""
    for name in ("mine", "mine-awq"):
        copy(tmp_path, name)
    (tmp_path / "link").symlink_to(tmp_path / "models")
    scripted.own = tmp_path / "link"
    scripted.answers()
    (tmp_path / "models.yaml").write_text("models: [{name: mine, source: ./link/mine}]\n")
    containers.quantize("mine", "awq", "", 0.05)
    assert told(scripted.runs[0])["source"] == "/models/own/mine"


@pytest.mark.parametrize(("wanted", "method", "data", "said"), [
    ("bundled", "int3", "", "METHOD=int3"), ("nobody", "awq", "", "neither bundled"), ("org/m", "awq", "/no/rows.jsonl", "/no/rows.jsonl: No such file"),
    ("ELSEWHERE", "awq", "", "containers do not see"), ("mine", "awq", "", "has a model 'mine-awq' already, in org/other"),
    ("CLOSED", "awq", "", "cannot read .*chmod o\\+rx"),
])
def test_mistakes_are_said_before_a_container_is_started(tmp_path: Path, scripted: Docker, wanted: str, method: str, data: str, said: str) -> None:
    (tmp_path / "models.yaml").write_text("models: [{name: mine, source: org/m}, {name: mine-awq, source: org/other}]\n")
    if wanted == "ELSEWHERE":
        wanted = str(tmp_path / "elsewhere")
        Path(wanted).mkdir()
        Path(wanted, "config.json").write_text("{}")
    if wanted == "CLOSED":
        wanted = "org/x"
        (tmp_path / "models").mkdir()
        os.chown(tmp_path / "models", 1234 if os.geteuid() == 0 else -1, -1)
        (tmp_path / "models").chmod(0o700)
    with pytest.raises(UserError, match=said):
        containers.quantize(wanted, method, data, 0.05)
    assert not scripted.runs


def test_on_a_gpu_the_stack_is_to_be_stopped_first(tmp_path: Path, scripted: Docker) -> None:
    scripted.answers(gpus=True)
    with pytest.raises(UserError, match="no bundled model"):
        containers.quantize("bundled", "awq", "", 0.05)
    scripted.answers(gpus=True, running="nginx\\nworker-m-1-ab12\\ntrainer\\nredis\\n")
    with pytest.raises(UserError, match="docker compose stop worker-m-1-ab12 trainer;"):
        containers.quantize("org/m", "awq", "", 0.05)
    assert not scripted.runs


@pytest.mark.parametrize(("dial", "value", "said"), [("MAX_PERPLEXITY_LOSS", "5%", "MAX_PERPLEXITY_LOSS=5%"), ("PATH", "/nowhere", "docker: No such file")])
def test_the_command_says_a_mistake_in_one_line(monkeypatch: pytest.MonkeyPatch, dial: str, value: str, said: str) -> None:
    monkeypatch.setenv(dial, value)
    with pytest.raises(SystemExit, match=said):
        containers.main()


def test_speculation_as_the_page_says_it_starts(tmp_path: Path) -> None:
    """The line of models.yaml in docs/optimising.md, down to vLLM's own parser."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    [block] = [text for text in (ROOT / "docs/optimising.md").read_text().split("```") if text.strip().startswith("models:")]
    (tmp_path / "models.yaml").write_text(block)
    [entry] = catalog.read(tmp_path / "models.yaml").models
    flags = make_arg_parser(FlexibleArgumentParser()).parse_args(["--model", "m", *shlex.split(entry.arguments)])
    assert flags.speculative_config == {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_min": 2, "prompt_lookup_max": 4}


@needs_engine
def test_the_whole_way_in_a_container(tmp_path: Path) -> None:
    """A model of two layers, its weights by chance: what is real here is the container, not the loss; adapters on int4."""
    own = tmp_path / "models"
    tiny(own / "tiny")
    docker("compose", "--profile", "tools", "build", "-q", "quantize", timeout_s=1800)
    env = ENV | {"MODELS_DIR": str(own), "MODELS_FILE": str(tmp_path / "models.yaml"), "MODEL": "tiny", "METHOD": "awq"}
    (tmp_path / "models.yaml").write_text("models: [{name: tiny, source: ./models/tiny, max_tokens: 512}]  # mine\n")
    try:
        done = subprocess.run(["make", "-s", "quantize-compose"], cwd=ROOT, env=env, capture_output=True, text=True, timeout=900)
        print(done.stdout[-3000:])
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        made = checkpoint.original(str(own / "tiny-awq"))
        assert made == ("/models/own/tiny", ""), "the trainer's container finds it there"
        assert (own / "tiny-awq").stat().st_uid == (10001 if os.geteuid() == 0 else os.getuid())
        written = compose.document(catalog.read(tmp_path / "models.yaml"), 0, own)["services"]
        (worker,) = [s for name, s in written.items() if name.startswith("worker-tiny-awq")]
        assert (worker["environment"]["MODEL"], worker["environment"]["MAX_MODEL_LEN"]) == ("/models/own/tiny-awq", "512")
        assert "# mine" in (tmp_path / "models.yaml").read_text()
        again = subprocess.run(["make", "-s", "quantize-compose"], cwd=ROOT, env=env | {"MODEL": "tiny-awq"}, capture_output=True, text=True, timeout=300)
        assert again.returncode and "MODEL=tiny-awq is awq already" in again.stdout + again.stderr
        assert "Traceback" not in again.stdout + again.stderr
        tuned_on(own / "tiny-awq", own / "tiny", tmp_path)
    finally:
        docker("compose", "--profile", "tools", "down", "-v", "--remove-orphans", check=False)


def tiny(folder: Path) -> None:
    """A checkpoint with the bundled model's tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    bundled = ROOT / ".state/models" / model.NAME
    model.unpack(bundled)
    tokenizer = AutoTokenizer.from_pretrained(bundled)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=1024, tie_word_embeddings=True,
    )).to(torch.bfloat16).save_pretrained(folder)  # fmt: skip
    tokenizer.save_pretrained(folder)
    for file in folder.iterdir():
        file.chmod(0o644)  # transformers writes for its own user alone
