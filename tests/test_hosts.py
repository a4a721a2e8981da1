"""Hosts and models before anything runs: models.yaml, what it becomes for both launchers, downloads, drivers, rights, TLS."""

import asyncio
import concurrent.futures
import contextlib
import hashlib
import http.server
import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import httpx
import jsonschema
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from common import gpus
from common.database import StateTooNew
from common.gpus import Gpu, Gpus
from common.sizing import cards, fit
from common.sizing.cards import CannotSay
from services.local import accelerator, apply, catalog, compose, configs, places, programs, room, workers
from services.local.catalog import Catalog, Entry
from services.local.configs import find_nginx, write_configs
from services.local.errors import UserError
from services.local.places import ASLEEP_SHARE, MOST_SHARE, Place
from services.local.plan import ROOT, Dials, Ports, read_dials
from services.local.running import last_words
from services.local.state_version import STATE_VERSION, check_version
from services.secrets.__main__ import make as make_secrets
from services.trainer.place import is_time
from services.worker import fetch
from tests.harness import Stack, body, running, wait_for
from tests.jobs_service import database

GIB = 2**30


def entry(name: str = "a", **fields: object) -> Entry:
    return Entry(name=name, **fields)  # type: ignore[arg-type]


class TestModelsFile:
    def read(self, folder: Path, text: str) -> Catalog:
        (folder / "models.yaml").write_text(text)
        return catalog.read(folder / "models.yaml")

    @pytest.mark.parametrize(("text", "says"), [
        ("models:\n- name: a\n  replicas: 0\n", "line 3: models[0].replicas"),
        ("models:\n- name: a\n- nam: b\n", "line 3: models[1].nam: there is no such field"),
        ("models:\n- name: a\n\n- name: a\n", "line 4: models[1].name: there is another model called 'a'"),
        ("models: [\n", "no YAML"), ("", "line 1: the file"), ("models:\n- 7\n", "line 2: models[0]"), ("models: []", "line 1: models"),
        ("models:\n- name: a\n  source: ./x\n", "line 3: models[0].source: there is no checkpoint"),
        ("models:\n- name: a\n  source: x y\n", "neither bundled, a folder, nor like org/model@revision"),
        ("models:\n- name: a\n  engine: attached\n", "needs the url"), ("models:\n- name: a\n  url: http://x\n", "is for engines that run elsewhere"),
        ("models:\n- name: a\n  engine: attached\n  url: http://x\n  start: on_demand\n", "line 5: models[0].start"),
        ("models:\n- name: a\n  arguments: \"'\"\n", "line 3: models[0].arguments"), ("models:\n- name: a\n  task: embedding\n", "bundled model is for chat"),
        ("models:\n- {name: ../x}\n", "models[0].name"), ("awake: 2\n", "line 1: the file"),
    ])
    def test_a_mistake_is_named_with_its_line(self, tmp_path: Path, text: str, says: str) -> None:
        with pytest.raises(UserError) as caught:
            self.read(tmp_path, text)
        assert says in str(caught.value)
        assert "models.yaml" in str(caught.value)

    def test_the_example_and_its_schema(self) -> None:
        schema = json.loads(catalog.SCHEMA.read_text())
        assert catalog.SCHEMA.read_text() == catalog.schema(), "python -m services.local.catalog"
        document = yaml.safe_load((ROOT / "examples/models.yaml").read_text())
        jsonschema.validate(document, schema)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({"models": [{"name": "a", "replicas": "two"}]}, schema)
        assert [e.name for e in catalog.read(ROOT / "examples/models.yaml").models] == ["smollm2-135m-instruct", "smollm2-long"]

    def test_folders_are_beside_the_file_and_revisions_are_pinned(self, tmp_path: Path) -> None:
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine/config.json").write_text("{}")
        found = self.read(tmp_path, "models:\n- {name: a, source: ./mine}\n- {name: b, source: org/model@v1/x}\n").models
        assert found[0].model(Path("/m")) == str(tmp_path / "mine")
        assert (found[1].model(Path("/m")), found[1].revision) == ("org/model", "v1/x")
        env = places.environment(found[1], Path("/m"), Place(), 1)
        assert env == {"MODEL": "org/model", "MODEL_REVISION": "v1/x", "SERVED_MODEL_NAME": "b"}

    def test_dials_that_say_what_is_served_say_nothing_beside_it(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.read(tmp_path, "models:\n- {name: a}\n")
        monkeypatch.setenv("MODELS_FILE", str(tmp_path / "models.yaml"))
        assert [e.name for e in read_dials().catalog.models] == ["a"]
        monkeypatch.setenv("MODEL", "org/other")
        with pytest.raises(UserError, match=r"MODEL=org/other: .*models\.yaml says what is served"):
            read_dials()


class TestPlaces:
    @given(st.lists(st.builds(
        Entry, name=st.uuids().map(str), start=st.sampled_from(["always", "on_demand"]), replicas=st.integers(1, 3), gpus=st.integers(1, 2),
        gpu_memory=st.none() | st.floats(0.05, 0.98)), min_size=1, max_size=5), st.integers(1, 4), st.integers(1, 3))
    def test_no_gpu_is_promised_twice(self, entries: list[Entry], count: int, awake: int) -> None:
        found = Catalog(models=entries, awake=awake)
        try:
            dealt = places.deal(found, range(count))
        except UserError:
            return
        for gpu in range(count):
            always = [p.share for e in entries for p in dealt[e.name] if gpu in p.gpus and e.start == "always"]
            turning = [p.share for e in entries for p in dealt[e.name] if gpu in p.gpus and e.start == "on_demand"]
            assert sum(always) + sum(sorted(turning)[-awake:]) <= 0.981
            assert len({p.name for e in entries for p in dealt[e.name] if gpu in p.gpus}) <= 1, "one arbiter a GPU"
        assert all(len(place.gpus) == e.gpus for e in entries for place in dealt[e.name])

    @given(st.lists(st.tuples(st.booleans(), st.floats(0.05, 0.98)), min_size=1, max_size=6), st.integers(1, 3))
    def test_what_fits_is_not_refused(self, wanted: list[tuple[bool, float]], awake: int) -> None:
        """Models of .4, .4 and .9 that take turns on one GPU were refused."""
        entries = [entry(f"m{at}", start="on_demand" if turns else "always", gpu_memory=share) for at, (turns, share) in enumerate(wanted)]
        needed = sum(share for turns, share in wanted if not turns) + sum(sorted(share for turns, share in wanted if turns)[-awake:])
        try:
            places.deal(Catalog(models=entries, awake=awake), [0])
        except UserError:
            assert needed > MOST_SHARE
        else:
            assert needed <= MOST_SHARE + 1e-6

    @given(st.integers(1, 4), st.integers(0, 5), st.integers(0, 8), st.integers(1, 2))
    def test_without_a_word_everything_fits_and_what_sleeps_has_room(self, gpus: int, always: int, turning: int, awake: int) -> None:
        entries = [entry(f"a{at}") for at in range(always)] + [entry(f"t{at}", start="on_demand") for at in range(turning)]
        if not entries:
            return
        dealt = places.deal(Catalog(models=entries, awake=awake), range(gpus))
        for gpu in range(gpus):
            held = [dealt[e.name][0].share for e in entries if gpu in dealt[e.name][0].gpus and e.start == "always"]
            turns = [dealt[e.name][0].share for e in entries if gpu in dealt[e.name][0].gpus and e.start == "on_demand"]
            asleep = max(0, len(turns) - awake) if gpus == 1 else 0
            assert sum(held) + sum(sorted(turns)[-awake:]) + ASLEEP_SHARE * asleep <= MOST_SHARE + 0.01

    def test_replicas_get_a_gpu_each_and_on_demand_models_share_one(self) -> None:
        found = Catalog(models=[entry("a", replicas=2), entry("b", start="on_demand", gpu_memory=0.9), entry("c", start="on_demand", gpu_memory=0.5)])
        dealt = places.deal(found, range(3))
        assert [p.gpus for p in dealt["a"]] == [(0,), (1,)]
        assert dealt["b"][0].name == dealt["c"][0].name == "gpu-2"
        with pytest.raises(UserError, match=r"b needs 90% of 1 GPU\(s\), and with it GPU 0 would hold 1"):
            places.deal(found, range(2))

    def test_on_demand_models_take_turns_only_where_no_gpu_is_left(self) -> None:
        found = Catalog(models=[entry("a", start="on_demand", replicas=2), entry("b", start="on_demand")])
        assert [[p.gpus for p in each] for each in places.deal(found, range(4)).values()] == [[(0,), (1,)], [(2,)]]
        assert [[p.gpus for p in each] for each in places.deal(found, range(2)).values()] == [[(0,), (1,)], [(0,)]]
        assert [[p.gpus for p in each] for each in places.deal(found, range(1)).values()] == [[(0,), (0,)], [(0,)]]

    def test_gpus_that_a_worker_holds_together_are_one_place(self) -> None:
        """A training on GPU 0 must put the engine to sleep that has GPU 0 and 1."""
        found = Catalog(models=[entry("a", gpu_memory=0.4), entry("b", gpu_memory=0.4), entry("big", gpus=2, gpu_memory=0.5)])
        dealt = places.deal(found, range(2))
        assert [dealt[name][0].gpus for name in ("a", "b", "big")] == [(0,), (1,), (0, 1)]
        assert {dealt[name][0].name for name in ("a", "b", "big")} == {"gpu-0-1"}
        assert {each[0].name for each in places.deal(found, range(4)).values()} == {"gpu-0-1", "gpu-2", "gpu-3"}

    def test_a_small_model_takes_its_turn_where_a_large_one_has_several_gpus(self) -> None:
        found = Catalog(models=[entry("small", start="on_demand"), entry("big", start="on_demand", gpus=2)])
        dealt = places.deal(found, range(2))
        assert (dealt["big"][0].gpus, dealt["small"][0].gpus) == ((0, 1), (0,))
        assert dealt["big"][0].name == dealt["small"][0].name == "gpu-0-1"

    def test_one_card_holds_several_when_nobody_says_how(self) -> None:
        dealt = places.deal(Catalog(models=[entry("a"), entry("b")]), range(1))
        assert [dealt[name][0] for name in "ab"] == [Place((0,), 0.45, (0,))] * 2


class TestChange:
    def dials(self, *entries: Entry) -> Dials:
        return Dials(Path("/s"), Catalog(models=list(entries)), models_file=Path("models.yaml"))

    def test_only_what_changed_is_new_and_no_name_is_used_twice(self) -> None:
        first = workers.change([], workers.wanted(self.dials(entry("a", replicas=2), entry("b"))), iter(range(100))).new
        assert [w.name for w in first] == ["worker-a-1", "worker-a-2", "worker-b-1"]
        change = workers.change(first, workers.wanted(self.dials(entry("a", replicas=1), entry("b", max_tokens=9), entry("c"))), iter(range(50, 99)))
        assert [w.name for w in change.kept] == ["worker-a-1"]
        assert [w.name for w in change.new] == ["worker-b-2", "worker-c-1"]
        assert [w.name for w in change.old] == ["worker-a-2", "worker-b-1"]

    def test_anew_replaces_every_one(self) -> None:
        asked = workers.wanted(self.dials(entry("a"), entry("b")))
        first = workers.change([], asked, iter(range(9))).new
        change = workers.change(first, asked, iter(range(9, 20)), anew=True)
        assert ([w.name for w in change.new], change.old, change.kept) == (["worker-a-2", "worker-b-2"], first, [])

    def test_without_the_file_names_are_as_ever_and_cores_are_dealt_out(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
        dials = Dials(Path("/s"), Catalog(models=[entry("m", replicas=2)]))
        found = workers.change([], workers.wanted(dials), iter(range(9))).new
        assert [(w.name, w.env["CPU_THREADS_BIND"]) for w in found] == [("worker-1", "0,2"), ("worker-2", "1,3")]


class TestCompose:
    MODELS: ClassVar[str] = ("models:\n- {name: chat, replicas: 2}\n- {name: second, start: on_demand, adapters: false}\n"
                             "- {name: hub, source: org/model@abc, gpus: 1}\n")

    @pytest.fixture
    def made(self, tmp_path: Path) -> Iterator[Path]:
        """compose.yaml and all that it names, beside a models.yaml."""
        for name in ("compose.yaml", "services", "gateway", "nginx", "monitoring", "models"):
            (tmp_path / name).symlink_to(ROOT / name)
        (tmp_path / "models.yaml").write_text(self.MODELS)
        return tmp_path

    def config(self, folder: Path, gpus: int) -> dict:
        (folder / "models.compose.yaml").write_text(compose.text(folder / "models.yaml", gpus, folder / "models"))
        env = os.environ | {"ACCELERATOR": "cuda" if gpus else "cpu", "COMPOSE_FILE": "compose.yaml:models.compose.yaml"}
        done = subprocess.run(["docker", "compose", "config", "--format", "json"], cwd=folder, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)["services"]

    @pytest.mark.skipif(not shutil.which("docker") or subprocess.run(["docker", "compose", "version"], capture_output=True, check=False).returncode != 0,
                        reason="no docker compose here")
    def test_composes_own_reading_of_it(self, made: Path) -> None:
        """One worker a GPU set, every one as hardened as the worker of compose.yaml."""
        services = self.config(made, gpus=4)
        found = {name: service for name, service in services.items() if name.startswith("worker")}
        assert [re.sub(r"-\w{4}$", "", name) for name in sorted(found)] == ["worker-chat-1", "worker-chat-2", "worker-hub-1", "worker-second-1"]
        devices = [service["deploy"]["resources"]["reservations"]["devices"] for _, service in sorted(found.items())]
        assert [[each["device_ids"] for each in one] for one in devices] == [[["0"]], [["1"]], [["2"]], [["3"]]]
        for service in found.values():
            assert (service["user"], service["read_only"], service["cap_drop"]) == ("10001:10001", True, ["ALL"])
            assert service["networks"] == {"backend": {"aliases": ["worker"]}}
            assert any(volume["target"] == "/cache" for volume in service["volumes"])
            assert any("exec" in mount for mount in service["tmpfs"])
        assert compose.wanted(made / "models.yaml", made / "models").splitlines()[1:] == ["/models/smollm2-135m-instruct", "org/model@abc"]
        assert services["trainer"]["environment"]["SERVED_MODEL_NAME"] == "chat"
        assert services["trainer"]["environment"]["PLACE"] == "gpu-0"

    def test_both_launchers_tell_a_worker_the_same(self, made: Path) -> None:
        found = catalog.read(made / "models.yaml")
        by_compose = compose.document(found, 0, made / "models")["services"]
        dials = Dials(Path("/s"), found, models_file=made / "models.yaml")
        for wanted in workers.wanted(dials):
            env = {"PLACE": ""} | {name: value.replace(str(dials.models), "/models") for name, value in wanted.env.items()}
            assert env in [service.get("environment") for service in by_compose.values()]

    def test_both_launchers_tell_the_trainer_the_same(self, tmp_path: Path) -> None:
        """It asked the hub's library for `main` where MODEL_REVISION was served."""
        found = Catalog(models=[entry("mine", source="org/model@abc", gpus=2)])
        by_compose = compose.document(found, 2, tmp_path)["services"]["trainer"]
        dials = Dials(tmp_path, found, models_file=tmp_path / "models.yaml", gpus=(0, 1))
        here = programs.trainer(dials, Ports.take(iter(range(20)), 1), found.models[0]).env
        for name, value in by_compose["environment"].items():
            assert here[name] == value, name
        assert (here["MODEL_REVISION"], here["PLACE"], here["CUDA_VISIBLE_DEVICES"]) == ("abc", "gpu-0-1", "0")
        assert by_compose["deploy"]["resources"]["reservations"]["devices"][0]["device_ids"] == ["0"]

    def test_a_changed_entry_is_a_service_of_another_name(self, made: Path) -> None:
        def names(text: str) -> set[str]:
            (made / "models.yaml").write_text(text)
            return {n for n in compose.document(catalog.read(made / "models.yaml"), 0, made / "models")["services"] if "-" in n}

        before, after = names(self.MODELS), names(self.MODELS.replace("adapters: false", "adapters: false, max_tokens: 99"))
        assert {n.rpartition("-")[0] for n in before ^ after} == {"worker-second-1"}
        assert len(before & after) == 3

        def rest(text: str) -> dict:
            (made / "models.yaml").write_text(text)
            found = compose.document(catalog.read(made / "models.yaml"), 0, made / "models")["services"]
            return {name: service for name, service in found.items() if not name.startswith("worker-second")}

        assert rest(self.MODELS) == rest(self.MODELS.replace("adapters: false", "adapters: false, max_tokens: 99")), "nobody else is touched"

    def test_another_models_yaml_than_the_one_applied_stops_the_start(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        file = tmp_path / "models.yaml"
        file.write_text("models: [{name: a}]\n")
        monkeypatch.setattr(fetch, "MODELS_FILE", file)
        monkeypatch.setattr(fetch, "WANTED", tmp_path / "models.wanted")
        fetch.check_drift()
        (tmp_path / "models.wanted").write_text(compose.wanted(file, tmp_path))
        assert fetch.told() == ["/models/smollm2-135m-instruct"]
        fetch.check_drift()
        file.write_text("models: [{name: b}]\n")
        with pytest.raises(fetch.Refused, match="make apply"):
            fetch.check_drift()
        (tmp_path / "config.json").write_text("{}")
        monkeypatch.setattr(sys, "argv", ["fetch", str(tmp_path)])
        fetch.main()  # one that is named has nothing to do with the file
        monkeypatch.setattr(sys, "argv", ["fetch"])
        with pytest.raises(SystemExit, match="make apply"):
            fetch.main()

    def test_a_folder_that_containers_do_not_see(self, made: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
        other = tmp_path_factory.mktemp("other")
        (other / "config.json").write_text("{}")
        (made / "models.yaml").write_text(f"models: [{{name: a, source: {other}}}]\n")
        with pytest.raises(UserError, match="MODELS_DIR"):
            compose.text(made / "models.yaml", 0, made / "models")

    def test_compose_is_told_of_the_file_once(self, tmp_path: Path) -> None:
        env = tmp_path / ".env"
        env.write_text("PORT=1")
        for _ in range(2):
            compose.name_it(env)
        assert env.read_text() == "PORT=1\nCOMPOSE_FILE=compose.yaml:models.compose.yaml\n"
        env.write_text("COMPOSE_FILE=x.yaml\n")
        with pytest.raises(UserError, match=r"COMPOSE_FILE=x\.yaml"):
            compose.name_it(env)
        env.write_text("#COMPOSE_FILE=compose.yaml:models.compose.yaml\n")  # says nothing
        compose.name_it(env)
        assert env.read_text().splitlines()[1:] == ["COMPOSE_FILE=compose.yaml:models.compose.yaml"]

    def test_a_compose_file_of_the_shell_that_lacks_it_is_refused(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """Compose would have read the other file alone, and the only worker was removed."""
        monkeypatch.setenv("COMPOSE_FILE", "compose.yaml")
        with pytest.raises(UserError, match=r"add :models\.compose\.yaml"):
            compose.name_it(tmp_path / ".env")


class Hub(http.server.BaseHTTPRequestHandler):
    """A hub with one repository, as far as the hub's library asks: what it lists, and files in parts. Cut off once, it goes on."""

    FILES: ClassVar[dict[str, bytes]] = {
        "config.json": b"{}", "model-1.safetensors": bytes(25_000_000), "consolidated.safetensors": b"x" * 9, "params.json": b"{}",
        "tekken.json": b"{}", "pytorch_model.bin": b"pickle", "tokenizer.json": b"{}", "tokenizer.model.v3": b"x", "original/params.json": b"{}",
        "README.md": b"x",
    }
    cut_after: ClassVar[int] = 0
    asked: ClassVar[list[tuple[str, str]]] = []
    COMMIT = "a" * 40

    def do_HEAD(self) -> None:
        self.answer(head=True)

    def do_GET(self) -> None:
        self.answer(head=False)

    def answer(self, head: bool) -> None:
        if self.path.startswith("/api/models/org/model/tree/"):
            listed = [{"type": "file", "path": name, "size": len(data), "oid": self.etag(data),
                       "lfs": {"oid": self.etag(data), "size": len(data), "pointerSize": 1}} for name, data in self.FILES.items()]
            self.reply(200, json.dumps(listed).encode(), {"content-type": "application/json"}, head)
            return
        if self.path.startswith("/api/models/org/model"):
            siblings = [{"rfilename": name, "size": len(data), "blobId": self.etag(data),
                         "lfs": {"sha256": self.etag(data), "size": len(data), "pointerSize": 1}} for name, data in self.FILES.items()]
            self.reply(200, json.dumps({"id": "org/model", "modelId": "org/model", "sha": self.COMMIT, "siblings": siblings, "tags": [],
                                        "private": False, "downloads": 0, "likes": 0}).encode(), {"content-type": "application/json"}, head)
            return
        name = self.path.partition(f"/resolve/{self.COMMIT}/")[2]
        if name not in self.FILES:
            self.reply(404, b"{}", {}, head)
            return
        data, first = self.FILES[name], 0
        if span := re.match(r"bytes=(\d+)-", self.headers.get("range", "")):
            first = int(span[1])
        self.asked.append((name, self.headers.get("range", "")))
        headers = {"etag": f'"{self.etag(data)}"', "x-repo-commit": self.COMMIT, "accept-ranges": "bytes"}
        if first:
            headers["content-range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
        if Hub.cut_after and not head and name.endswith(".safetensors") and not first:
            self.send_response(200)
            for key, value in (headers | {"content-length": str(len(data))}).items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(data[: Hub.cut_after])
            self.wfile.flush()
            self.connection.close()
            return
        self.reply(206 if first else 200, data[first:], headers, head)

    @staticmethod
    def etag(data: bytes) -> str:
        return hashlib.sha256(data).hexdigest()

    def reply(self, status: int, data: bytes, headers: dict[str, str], head: bool) -> None:
        self.send_response(status)
        for key, value in (headers | {"content-length": str(len(data))}).items():
            self.send_header(key, value)
        self.end_headers()
        if not head:
            self.wfile.write(data)

    def log_message(self, *_: object) -> None: ...


class TestFetch:
    @pytest.fixture
    def hub(self) -> Iterator[str]:
        Hub.asked.clear()
        Hub.cut_after = 0
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        server.server_close()

    def fetch(self, hub: str, folder: Path, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
        # No proxy in between: one keeps what was cut off to itself.
        settings = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
        settings |= {"HF_ENDPOINT": hub, "HF_HOME": str(folder), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "*", **env}
        return subprocess.run([sys.executable, "-m", "services.worker.fetch", *words], cwd=ROOT, env=settings, capture_output=True, text=True,
                              check=False, timeout=120)

    def test_only_what_is_needed_at_its_revision_once(self, hub: str, tmp_path: Path) -> None:
        done = self.fetch(hub, tmp_path, "org/model@main")
        assert done.returncode == 0, done.stderr
        snapshot = Path(done.stdout.strip().rpartition(" is in ")[2])
        assert snapshot.name == Hub.COMMIT
        assert sorted(p.name for p in snapshot.rglob("*")) == ["config.json", "model-1.safetensors", "tokenizer.json"]
        count = len(Hub.asked)
        assert self.fetch(hub, tmp_path, MODEL="org/model", MODEL_REVISION=Hub.COMMIT).returncode == 0
        assert not [name for name, _ in Hub.asked[count:] if name.endswith("safetensors")]

    def test_what_was_cut_off_goes_on_where_it_was(self, hub: str, tmp_path: Path) -> None:
        Hub.cut_after = 15_000_000
        self.fetch(hub, tmp_path, "org/model")
        Hub.cut_after = 0
        assert self.fetch(hub, tmp_path, "org/model").returncode == 0
        assert [span for name, span in Hub.asked if name == "model-1.safetensors" and span.startswith("bytes=") and span != "bytes=0-"]

    def test_no_room_is_said_before_anything_is_fetched(self, hub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10 * 10**9, 0, 500_000))
        file = type("File", (), {"rfilename": "model.safetensors", "size": 15 * 10**9, "lfs": None, "blob_id": "b"})
        with pytest.raises(fetch.Refused, match=r"needs 16\.0 GB of disk, and .* has 0\.0 GB free: 16\.0 GB are missing"):
            fetch.check_disk("org/model", [file], tmp_path)

    @pytest.mark.parametrize("model", ["org/nothing", "/no/such/folder"])
    def test_what_is_not_there_is_one_line(self, hub: str, tmp_path: Path, model: str) -> None:
        done = self.fetch(hub, tmp_path, model)
        assert done.returncode == 1
        assert done.stderr.strip().splitlines()[-1].startswith("fetch: ")
        assert "Traceback" not in done.stderr


class TestDriver:
    def found(self, driver: str = "590.1", free: float = 1.0, name: str = "NVIDIA GeForce RTX 4090") -> Gpus:
        card = cards.find(name)
        return Gpus(driver, (Gpu(name, card.memory_bytes, int(card.memory_bytes * free)),))

    def test_one_number_for_the_oldest_driver(self) -> None:
        assert accelerator.MIN_DRIVER == cards.MIN_DRIVER

    def test_too_old_a_driver_and_a_card_that_others_have(self) -> None:
        fit.check_driver(self.found())
        with pytest.raises(CannotSay, match=r"driver is 550\.3; .* needs 580"):
            fit.check_driver(self.found("550.3"))
        fit.check_free(self.found(free=0.95), (0,), 0.9)
        with pytest.raises(CannotSay, match="another engine or a training has them"):
            fit.check_free(self.found(free=0.5), (0,), 0.9)
        with pytest.raises(CannotSay, match="this machine has 1"):
            fit.check_free(self.found(), (1,), 0.9)

    @pytest.mark.parametrize(("said", "count", "numbers"), [
        (None, 1, (0,)), (None, 2, (0, 1)), ("1", 1, (1,)), ("2, 0", 1, (2, 0)), ("GPU-b", 1, (1,)), ("GPU-c3,GPU-a1", 2, (2, 0)),
        ("GPU-x", 1, (0,)), ("MIG-b2", 1, (0,)), ("", 2, (0, 1)),
    ])
    def test_the_gpus_that_a_process_may_use(
        self, monkeypatch: pytest.MonkeyPatch, said: str | None, count: int, numbers: tuple[int, ...]
    ) -> None:
        """An engine on GPU 1, named by its UUID, was refused for want of memory of GPU 0."""
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if said is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", said)
        found = Gpus("590.1", tuple(Gpu("card", 1, 1, uuid) for uuid in ("GPU-a1", "GPU-b2", "GPU-c3")))
        assert gpus.visible(found, count) == numbers

    @pytest.mark.parametrize(("model", "gpu", "says"), [
        ("meta-llama/Meta-Llama-3-8B-Instruct", "Tesla T4", "are missing"), ("mistralai/Mistral-7B-Instruct-v0.3", "NVIDIA GeForce RTX 4090", ""),
        ("org/unknown", "NVIDIA GeForce RTX 4090", ""), ("mistralai/Mistral-7B-Instruct-v0.3", "NVIDIA L40S", ""),
    ])
    def test_a_model_too_large_for_its_card_stops_the_start(self, monkeypatch: pytest.MonkeyPatch, model: str, gpu: str, says: str) -> None:
        monkeypatch.setattr(gpus, "look", lambda: self.found(name=gpu))
        dials = Dials(Path("/s"), Catalog(models=[entry("m", source=model)]), gpus=(0,))
        if not says:
            room.check_gpus(dials)
            return
        with pytest.raises(UserError, match=says):
            room.check_gpus(dials)

    @pytest.mark.skipif(not shutil.which("gcc"), reason="no gcc here")
    @pytest.mark.parametrize(("asked", "nvml", "status", "says"), [
        ("auto", "devices 1\n", 0, "cuda"), ("auto", "devices 0\n", 0, "cpu"), ("cpu", "devices 1\n", 0, "cpu"),
        ("auto", "devices 1\ndriver 550\n", 1, "The NVIDIA driver is 550.1"), ("cuda", "fail:nvmlInitWithFlags 9\n", 1, "no NVIDIA driver answers"),
        ("tpu", "", 1, "auto, cpu or cuda"),
    ])
    def test_what_is_installed_for(self, tmp_path: Path, asked: str, nvml: str, status: int, says: str) -> None:
        subprocess.run(["gcc", "-shared", "-fPIC", "-o", str(tmp_path / "libnvidia-ml.so.1"), str(ROOT / "tests/fake_nvml.c")], check=True)
        (tmp_path / "nvml").write_text(nvml)
        env = os.environ | {"LD_LIBRARY_PATH": str(tmp_path), "FAKE_NVML": str(tmp_path / "nvml")}
        done = subprocess.run([sys.executable, "services/local/accelerator.py", asked], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == status
        assert says in (done.stderr if status else done.stdout)


class TestVersion:
    def test_a_newer_releases_state_is_refused_and_an_older_ones_taken(self, tmp_path: Path) -> None:
        check_version(tmp_path)
        assert (tmp_path / "version").read_text() == f"{STATE_VERSION}\n"
        for said in (str(STATE_VERSION + 1), "x"):
            (tmp_path / "version").write_text(said)
            with pytest.raises(UserError, match=f"state version {said}; this one knows {STATE_VERSION}"):
                check_version(tmp_path)
            assert (tmp_path / "version").read_text() == said

    def test_tables_of_a_newer_release(self, tmp_path: Path) -> None:
        kept = database(tmp_path)
        kept.transact(lambda c: c.exec_driver_sql("UPDATE alembic_version SET version_num = 'r9999'"))
        with pytest.raises(StateTooNew, match="newer release"):
            kept.migrate()


def test_the_last_words_name_the_cause(tmp_path: Path) -> None:
    log = tmp_path / "w.log"
    log.write_text("RuntimeError: Found no NVIDIA driver on your system.\n    raise RuntimeError(\n"
                   "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}\n"
                   '{"event":"engine died","reason":"exit status 1"}\n')
    assert last_words(log) == "RuntimeError: Found no NVIDIA driver on your system."
    log.write_text('{"event":"engine died","reason":"GPU 0 (NVIDIA L4) has 1.0 GiB of 22.0 GiB free"}\n')
    assert last_words(log).startswith("GPU 0 (NVIDIA L4)")
    log.write_text('{"event":"x","exception":"Traceback\\n  File 1\\nValueError: no such flag"}\n7\n')
    assert last_words(log) == "ValueError: no such flag"


@pytest.mark.parametrize(("when", "now", "is_it"), [
    ("now", "12:00", True), ("idle", "12:00", True), ("22:00-06:00", "23:10", True), ("22:00-06:00", "05:59", True), ("22:00-06:00", "06:00", False),
    ("22:00-06:00", "12:00", False), ("09:30-10:00", "09:30", True), ("09:30-10:00", "10:00", False),
])
def test_when_a_training_may_begin(when: str, now: str, is_it: bool) -> None:
    import datetime

    assert is_time(when, datetime.time.fromisoformat(now)) is is_it


def test_programs_keep_roots_files_and_lose_roots_rights() -> None:
    show = "import re; s = open('/proc/self/status').read(); print(re.findall(r'(?:CapEff|CapPrm|CapBnd|NoNewPrivs):\\s*(\\w+)', s))"
    done = subprocess.run([sys.executable, "-m", "services.local.tether", sys.executable, "-c", show], cwd=ROOT, capture_output=True, text=True, check=True)
    said = done.stdout
    assert re.findall(r"'(\w+)'", said)[-1] == "1", "nothing is gained by set-user-ID files"
    if os.getuid() == 0:
        assert re.findall(r"'(\w+)'", said)[:3] == ["0" * 16] * 3


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for localhost and 127.0.0.1 from a CA of our own."""
    folder = tmp_path_factory.mktemp("tls")
    run = lambda *words: subprocess.run(["openssl", *words], cwd=folder, check=True, capture_output=True)  # noqa: E731
    run("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=test CA", "-days", "2",
        "-addext", "basicConstraints=critical,CA:TRUE", "-addext", "keyUsage=critical,keyCertSign")
    run("req", "-newkey", "rsa:2048", "-nodes", "-keyout", "privkey.pem", "-out", "server.csr", "-subj", "/CN=localhost")
    (folder / "ext").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\nauthorityKeyIdentifier=keyid\nsubjectKeyIdentifier=hash\n")
    run("x509", "-req", "-in", "server.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-out", "fullchain.pem", "-days", "2", "-extfile", "ext")
    return folder


class Secure(Stack):
    """A stack whose clients are asked for TLS."""

    FOLDER: ClassVar[Path]

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.kill("nginx", signal.SIGTERM)
        self.running["nginx"].wait(10)
        self.dials = Dials(folder, port=self.port, tls=self.FOLDER)
        write_configs(self.dials, self.ports)
        run_dir = str(self.dials.run_dir)
        self.spawn("nginx", [find_nginx(), "-p", run_dir, "-e", "stderr", "-c", f"{run_dir}/nginx.conf"])
        self.inner = f"http://127.0.0.1:{self.ports.inner}"
        wait_for(lambda: httpx.get(self.inner + "/health").status_code == 200, "healthy")
        self.base = self.inner


needs_tls = pytest.mark.skipif(
    "http_ssl_module" not in subprocess.run([find_nginx(), "-V"], capture_output=True, text=True, check=False).stderr or not shutil.which("openssl")
    or not shutil.which("curl"), reason="this nginx has no TLS (apt install nginx-light), or there is no openssl or curl")


@needs_tls
class TestTls:
    @pytest.fixture(scope="class")
    def secure(self, tmp_path_factory: pytest.TempPathFactory, tls: Path) -> Iterator[Secure]:
        Secure.FOLDER = tls
        with running(tmp_path_factory.mktemp("secure"), Secure) as found:
            found.add_worker("w1")
            assert isinstance(found, Secure)
            yield found

    @pytest.mark.parametrize("version", ["--http1.1", "--http2"])
    def test_answers_and_streams_come_through(self, secure: Secure, tls: Path, version: str) -> None:
        for stream in (False, True):
            done = subprocess.run(
                ["curl", "-sS", "-N", version, "--cacert", str(tls / "ca.pem"), "-w", "\n%{http_version} %{http_code}",
                 "-H", f"authorization: Bearer {secure.key}", "-H", "content-type: application/json",
                 "-d", json.dumps(body("say 20", stream=stream)), f"https://localhost:{secure.port}/v1/chat/completions"],
                capture_output=True, text=True, check=True)
            said, _, last = done.stdout.rstrip().rpartition("\n")
            assert last == ("2 200" if version == "--http2" else "1.1 200"), done.stdout
            assert ("data: [DONE]" in said and "w19" in said) if stream else "x" * 20 in said

    def test_many_streams_over_one_connection(self, secure: Secure, tls: Path) -> None:
        context = ssl.create_default_context(cafile=str(tls / "ca.pem"))
        with httpx.Client(verify=context, base_url=f"https://127.0.0.1:{secure.port}", headers={"authorization": f"Bearer {secure.key}"}) as http, \
                concurrent.futures.ThreadPoolExecutor(8) as pool:
            said = list(pool.map(lambda _: http.post("/v1/chat/completions", json=body("stream 30", stream=True), timeout=20).text, range(16)))
        assert all(text.rstrip().endswith("data: [DONE]") for text in said)

    def test_who_comes_in_clear_is_sent_to_https_and_strangers_are_refused(self, secure: Secure, tls: Path) -> None:
        plain = httpx.get(f"http://127.0.0.1:{secure.port}/health", headers={"host": f"localhost:{secure.port}"})
        assert (plain.status_code, plain.headers["location"]) == (308, f"https://localhost:{secure.port}/health")
        with pytest.raises(httpx.ConnectError, match=r"(?i)certificate"):
            httpx.get(f"https://localhost:{secure.port}/health")
        old = ssl.create_default_context(cafile=str(tls / "ca.pem"))
        with pytest.warns(DeprecationWarning, match="TLS"):
            old.maximum_version = ssl.TLSVersion.TLSv1_1
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"https://localhost:{secure.port}/health", verify=old)

    def test_the_folder_must_hold_both_files(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TLS_DIR", str(tmp_path))
        with pytest.raises(UserError, match=r"no fullchain\.pem"):
            read_dials()

    def test_both_launchers_write_the_same_lines(self, tls: Path) -> None:
        script = (ROOT / "nginx/entrypoint.sh").read_text()
        for line in configs.tls_lines(Path("$tls"), find_nginx()).split("; "):
            assert f"{line.rstrip(';')};" in script, line


def test_a_socket_is_taken_over_and_who_connects_meanwhile_waits(tmp_path: Path) -> None:
    from gateway.__main__ import bind, take_over

    async def live() -> None:
        path = tmp_path / "g.sock"
        old, new = bind(path), None
        take_over(path)
        try:
            new = bind(path)
            take_over(path)
            reader, writer = await asyncio.open_unix_connection(str(path))
            new.setblocking(False)
            connection, _ = await asyncio.get_running_loop().sock_accept(new)
            connection.close()
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()
            assert not await reader.read()
            assert [p.name for p in tmp_path.iterdir()] == ["g.sock"]
        finally:
            old.close()
            if new is not None:
                new.close()

    asyncio.run(live())


@pytest.mark.parametrize("processes", [1, 2])
def test_the_next_gateway_knows_the_workers_before_it_is_asked(tmp_path: Path, processes: int) -> None:
    """It took over some milliseconds earlier, and refused: no worker is ready. With two processes seconds earlier."""
    with running(tmp_path, processes=processes) as stack:
        stack.add_worker("w1")
        over, refused, seen = threading.Event(), list[str](), list[int]()

        def ask() -> None:
            """As nginx does, each time on a new connection."""
            headers = {"authorization": f"Bearer {stack.key}", "connection": "close"}
            while not over.is_set():
                with httpx.Client(transport=httpx.HTTPTransport(verify=False, uds=str(stack.dials.gateway_socket)), headers=headers, timeout=20) as client:
                    answer = client.post("http://gateway/v1/chat/completions", json=body("say 1"))
                seen.append(answer.status_code)
                if "x-accel-redirect" not in answer.headers and answer.status_code != 200:
                    refused.append(answer.text)

        clients = [threading.Thread(target=ask) for _ in range(4)]
        for client in clients:
            client.start()
        old = stack.running["gateway"]
        try:
            port = stack.ports.workers[-1]
            stack.spawn("gateway-next", [sys.executable, "-m", "gateway", *stack.gateway_args[2:], "--port", str(port)], stack.env("gateway"))
            wait_for(lambda: "gateway_requests" in metrics(port) or "gateway_decisions" in metrics(port), "the next gateway up", 30)
            time.sleep(1)
            old.terminate()
            assert old.wait(60) in (0, -signal.SIGTERM)  # uvicorn ends as it was told to
            time.sleep(1)
        finally:
            over.set()
            for client in clients:
                client.join()
        assert len(seen) > 100
        assert refused == []


def metrics(port: int) -> str:
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(f"http://127.0.0.1:{port}/metrics").text
    return ""


def test_sockets_that_nobody_took_over_with_are_removed(tmp_path: Path) -> None:
    from gateway.__main__ import LEFT_S, bind

    for name, age_s in (("g.0123abcd", LEFT_S + 1), ("g.89abcdef", 0)):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (time.time() - age_s,) * 2)
    bind(tmp_path / "g.sock").close()
    assert not (tmp_path / "g.0123abcd").exists()
    assert (tmp_path / "g.89abcdef").exists()


class Supervised:
    """A supervisor that only says what it would do."""

    def __init__(self, run_dir: Path) -> None:
        self.file, self.known, self.did = run_dir / "supervisord.conf", dict[str, str](), list[str]()

    def reloadConfig(self) -> list[list[list[str]]]:  # noqa: N802 - as supervisord calls it
        now = dict(re.findall(r"^\[program:(.*?)\]\n(.*?)(?=^\[|\Z)", self.file.read_text(), re.M | re.S))
        before, self.known = self.known, now
        return [[[n for n in now if n not in before], [n for n in now if n in before and now[n] != before[n]], [n for n in before if n not in now]]]

    def __getattr__(self, name: str) -> Callable[[str], None]:
        return lambda program: self.did.append(f"{name} {program}")

    def getAllProcessInfo(self) -> list[dict]:  # noqa: N802
        return []


def test_a_trainer_in_another_place_comes_back_last(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It would have trained on a card on which engines of the old place were still awake."""
    ports = Ports.take(iter(range(9000, 9100)), 16)
    before = Dials(tmp_path, Catalog(models=[entry("a")]), models_file=Path("models.yaml"), gpus=(0, 1))
    make_secrets(before.secrets)
    (tmp_path / "logs").mkdir()
    before.run_dir.mkdir(exist_ok=True)
    supervised = Supervised(before.run_dir)
    monkeypatch.setattr(apply, "supervisor_of", lambda dials: SimpleNamespace(supervisor=supervised))
    monkeypatch.setattr(apply.Stack, "_await", lambda stack, worker: None)
    monkeypatch.setattr(apply.Stack, "_has_room", lambda stack, new: False)
    try:
        workers.write(before, workers.change([], workers.wanted(before), iter([9050])).new)
        stack = apply.Stack(before, ports, "key", print)
        stack._configure(stack.workers)
        for catalog, moved in ((Catalog(models=[entry("a", gpus=2)]), True), (Catalog(models=[entry("a", gpus=2), entry("b", gpus=2)]), False)):
            supervised.did.clear()
            apply.Stack(replace(before, catalog=catalog), ports, "key", print).apply()
            if moved:
                assert supervised.did[-1] == "addProcessGroup trainer"
                assert supervised.did.index("removeProcessGroup trainer") < supervised.did.index("addProcessGroup worker-a-2")
            assert ("trainer" in " ".join(supervised.did)) is moved, supervised.did
    finally:
        shutil.rmtree(before.run_dir)


@pytest.mark.parametrize("owner", ["gateway", "gateway-next"])
def test_only_a_next_gateway_that_has_the_socket_makes_the_gateway_anew(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, owner: str
) -> None:
    """One that was still starting when the restart was broken off counted as well: the only gateway that answered was stopped."""
    dials = Dials(tmp_path)
    dials.run_dir.mkdir(exist_ok=True)
    supervised = Supervised(dials.run_dir)
    pids = {"gateway": 1, "gateway-next": 1} | {owner: os.getpid()}

    def told(name: str) -> Callable[[str], None]:
        def do(program: str) -> None:
            supervised.did.append(f"{name} {program}")
            if name == "startProcess":
                pids[program] = os.getpid()
        return do

    supervised.getAllProcessInfo = lambda: [{"name": name, "pid": pid} for name, pid in pids.items()]  # type: ignore[method-assign]
    monkeypatch.setattr(Supervised, "__getattr__", lambda fake, name: told(name))
    monkeypatch.setattr(apply, "supervisor_of", lambda dials: SimpleNamespace(supervisor=supervised))
    monkeypatch.setattr(apply.Stack, "_await_gateway", lambda *_: None)
    monkeypatch.setattr(apply.Stack, "_configure", lambda *_: supervised.did.append("configured"))
    try:
        workers.write(dials, [])
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(dials.gateway_socket))
            listener.listen()
            apply.Stack(dials, Ports.take(iter(range(9000, 9100)), 16), "key", print)._finish_gateway()
        anew = ["stopProcessGroup gateway", "startProcess gateway"]
        assert supervised.did == [*(anew if owner == "gateway-next" else []), "configured"]
    finally:
        shutil.rmtree(dials.run_dir)


def test_processes_take_over_however_long_the_first_takes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """After thirty seconds, or when the first was killed in its start, they never did, and nobody said so."""
    from gateway import __main__ as served

    path = tmp_path / "g.sock"
    ready = iter([False] * 100 + [True])
    fleet = object.__new__(served.Processes)
    fleet._path, fleet.processes = path, [SimpleNamespace(is_ready=lambda timeout: next(ready))]
    monkeypatch.setattr(served.Multiprocess, "keep_subprocess_alive", lambda fleet: None)
    with served.bind(path):
        for _ in range(100):
            fleet.keep_subprocess_alive()
        assert not path.exists()
        for _ in range(3):  # once is enough: nobody is asked any more
            fleet.keep_subprocess_alive()
        assert path.exists()
