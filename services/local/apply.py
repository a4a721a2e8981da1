"""`make apply` and `make restart`: a running stack is made into what models.yaml says now, without failing a request.

A new worker comes up beside the one that it replaces, where there is memory for both; when it answers, the old one
takes no new requests, finishes what it has, and ends. Where there is not, the old one goes first, and it is said so.
Workers, and all other programs, that are as they should be are not touched.
"""

import contextlib
import http.client
import socket
import struct
import time
import xmlrpc.client
from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest
from typing import Any

import httpx

from common import gpus
from common.files import write_whole
from common.sizing import fit
from common.sizing.cards import CannotSay
from services.local import room, workers
from services.local.catalog import Entry
from services.local.errors import UserError
from services.local.plan import Dials, Ports, is_free
from services.local.programs import Program, gateway, programs, supervisor_config
from services.local.running import inner, last_words, refuse_given_up, supervisor_of
from services.local.workers import Change, Worker

START_PATIENCE_S = 1800.0
LOOK_EVERY_S = 0.2
NEXT_GATEWAY = "gateway-next"

Say = Callable[[str], None]


class Stack:
    """A stack that runs: its supervisor, and what it says of its workers."""

    def __init__(self, dials: Dials, ports: Ports, key: str, say: Say) -> None:
        self._dials, self._ports, self._key, self._say = dials, ports, key, say
        self._supervisor: Any = supervisor_of(dials).supervisor
        self.workers = workers.read(dials)
        self._trainer_last = False
        """In another place it would train beside engines that are still in the old one: it comes back after them."""

    def apply(self, *, anew: bool = False) -> Change:
        """What models.yaml says; with `anew` every worker is replaced. Raises UserError."""
        self._finish_gateway()
        change = workers.change(self.workers, workers.wanted(self._dials), self._free_ports(), anew=anew)
        if self._dials.gpus:  # engines take what their card has, so all that leave make room for all that come
            if change.new or change.old:
                self._trainer_last = self._trainer_changes()
                try:
                    self._replace(change.new, change.old)
                finally:
                    self._trainer_last = False
                    self._configure(self.workers)
        else:
            for model in sorted({worker.model for worker in (*change.new, *change.old)}):
                new = [worker for worker in change.new if worker.model == model]
                old = [worker for worker in change.old if worker.model == model]
                if anew:  # as little as possible at a time
                    for one, other in zip_longest(new, old):
                        self._replace([one] if one else [], [other] if other else [])
                else:
                    self._replace(new, old)
        self._configure(self.workers)
        return change

    def reload_certificate(self) -> None:
        """nginx reads it again; connections stay."""
        with self._faults():
            self._supervisor.signalProcess("nginx", "HUP")

    def restart_gateway(self) -> None:
        """Another one takes its place, and gives it back to a new one of the old name."""
        self._finish_gateway()
        extra = gateway(self._dials, self._free_port(), NEXT_GATEWAY)
        self._say("gateway: the next one comes up")
        self._configure(self.workers, [extra])
        try:
            self._await_gateway(NEXT_GATEWAY, extra)
        except UserError:
            self._configure(self.workers)
            raise
        self._gateway_anew()
        self._configure(self.workers)

    def _gateway_anew(self) -> None:
        with self._faults():
            self._supervisor.stopProcessGroup("gateway")
            self._supervisor.startProcess("gateway")
        self._await_gateway("gateway", gateway(self._dials, self._ports.gateway))

    def _finish_gateway(self) -> None:
        """A restart that was broken off left the next gateway, which may have the socket, or be about to take it."""
        if self._pid_of(NEXT_GATEWAY) is None:
            return
        if self._listens() == self._pid_of(NEXT_GATEWAY) or not self._pid_of("gateway"):
            self._say("gateway: a restart that was broken off is finished first")
            self._gateway_anew()
        self._configure(self.workers)
        if self._listens() != self._pid_of("gateway"):  # the next one took it over just before it ended
            self._gateway_anew()

    def _pid_of(self, program: str) -> int | None:
        """Its process; 0 when it does not run, None when there is no such program."""
        with self._faults():
            known = {each["name"]: int(each["pid"]) for each in self._supervisor.getAllProcessInfo()}
        return known.get(program)

    def _listens(self) -> int:
        """The process that answers at the gateway's socket; 0: none."""
        with socket.socket(socket.AF_UNIX) as asked:
            try:
                asked.connect(str(self._dials.gateway_socket))
            except OSError:
                return 0
            who = asked.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        return int(struct.unpack("3i", who)[0])  # pid, uid, gid (unix(7)) of who called listen()

    def _replace(self, new: list[Worker], old: list[Worker]) -> None:
        name = ", ".join(dict.fromkeys(worker.model for worker in (*new, *old)))
        beside = not new or self._has_room(new)
        if not beside and not old:
            raise UserError(f"There is not enough free memory for {name}. Stop other programs, or let models start "
                            "on_demand.")
        if not beside:
            self._say(f"{name}: there is no memory for two; the old one ends first")
            self._stop(old)
        if new:
            self._say(f"{name}: {len(new)} worker(s) come up{' beside the old' if old and beside else ''}")
            self._configure([*self.workers, *new])
            try:
                for worker in new:
                    self._await(worker)
            except UserError:
                self._stop(new)
                if not beside:
                    self._say(f"{name}: the old one is started again")
                    self._configure([*self.workers, *old])
                raise
        if beside and old:
            self._stop(old)

    def _has_room(self, new: Sequence[Worker]) -> bool:
        """Whether there is memory for new workers beside all that run."""
        entries: dict[tuple[str, str], Entry] = {(each.name, each.engine): each for each in self._dials.catalog.models}
        if self._dials.gpus:
            return self._fits_beside(new)
        starts = [entries[worker.model, worker.env.get("ENGINE", "vllm")] for worker in new if worker.always]
        needed = sum(room.on_a_cpu(entry, self._dials.models) for entry in starts)
        return room.available_bytes() > needed

    def _fits_beside(self, new: Sequence[Worker]) -> bool:
        """Whether each new worker's GPUs have its share free."""
        try:
            found = gpus.look()
            for worker in new:
                if "CUDA_VISIBLE_DEVICES" in worker.env:
                    cards = tuple(int(number) for number in worker.env["CUDA_VISIBLE_DEVICES"].split(","))
                    fit.check_free(found, cards, float(worker.env["GPU_MEMORY_UTILIZATION"]))
        except (gpus.GpusAway, CannotSay):
            return False
        return True

    def _await(self, worker: Worker) -> None:
        """Until it answers, or sleeps until it is asked. Raises UserError when it does not come up."""
        deadline = time.monotonic() + START_PATIENCE_S
        log = self._dials.state / "logs" / f"{worker.name}.log"
        while time.monotonic() < deadline:
            state, held = self._state_of(worker.name)
            if state == "ready" or (state in ("asleep", "waking") and (held or not worker.always)):
                return
            refuse_given_up(self._dials, worker.name)
            time.sleep(LOOK_EVERY_S)
        raise UserError(f"{worker.name} is not ready after {START_PATIENCE_S:.0f} s; its log is {log}.")

    def _state_of(self, program: str) -> tuple[str, str]:
        """(state, what holds it) of the worker of a program, as it says; empty when it says nothing."""
        with contextlib.suppress(httpx.HTTPError, ValueError, KeyError):
            url = f"{inner(self._dials)}/v1/status"
            status = httpx.get(url, headers={"authorization": f"Bearer {self._key}"}, timeout=2).json()
            for worker in status["workers"]:
                if worker["id"].rpartition("-")[0] == program:
                    return str(worker["state"]), str(worker["held"])
        return "", ""

    def _stop(self, old: Sequence[Worker]) -> None:
        """Each takes nothing new, finishes what it has, ends."""
        for worker in old:
            self._say(f"{worker.model}: {worker.name} finishes what it has")
            with self._faults():
                self._supervisor.stopProcessGroup(worker.name)  # also one that was given up
        self._configure([worker for worker in self.workers if worker not in old])

    def _configure(self, now: list[Worker], extra: Sequence[Program] = ()) -> None:
        """Supervise these workers, and what there is beside them. What changed is started anew."""
        wanted = [*programs(self._dials, self._ports, now), *extra]
        if self._trainer_last:
            wanted = [program for program in wanted if program.name != "trainer"]
        write_whole([supervisor_config(self._dials, wanted).encode()], self._dials.run_dir / "supervisord.conf")
        with self._faults():
            added, changed, removed = self._supervisor.reloadConfig()[0]
            for name in (*removed, *changed):
                self._supervisor.stopProcessGroup(name)
                self._supervisor.removeProcessGroup(name)
            for name in (*added, *changed):
                (self._dials.state / "logs" / f"{name}.log").write_text("")
                self._supervisor.addProcessGroup(name)
        self.workers = now
        workers.write(self._dials, now)

    def _trainer_changes(self) -> bool:
        written = (self._dials.run_dir / "supervisord.conf").read_text()
        found = [program for program in programs(self._dials, self._ports, self.workers) if program.name == "trainer"]
        return supervisor_config(self._dials, found).partition("[program:")[2] not in written

    def _await_gateway(self, name: str, program: Program) -> None:
        port = program.command[program.command.index("--port") + 1]
        deadline = time.monotonic() + START_PATIENCE_S
        while time.monotonic() < deadline:
            with contextlib.suppress(httpx.HTTPError, ValueError):
                if httpx.get(f"http://127.0.0.1:{port}/ready", timeout=1).json()["workers"]:
                    return
            refuse_given_up(self._dials, name)
            time.sleep(LOOK_EVERY_S)
        log = self._dials.state / "logs" / f"{name}.log"
        raise UserError(f"{name} does not start: {last_words(log)} ({log})")

    @contextlib.contextmanager
    def _faults(self) -> Iterator[None]:
        try:
            yield
        except (OSError, xmlrpc.client.Error, http.client.HTTPException) as error:
            raise UserError(f"The stack's supervisor does not answer: {error}. Does make up run?") from error

    def _free_ports(self) -> Iterator[int]:
        """Those that were set aside for workers, and are not taken."""
        taken = {worker.port for worker in self.workers}
        return (port for port in (*self._ports.workers, *self._more_ports()) if port not in taken and is_free(port))

    def _free_port(self) -> int:
        return next(port for port in self._more_ports() if is_free(port))

    def _more_ports(self) -> range:
        """Beyond those: nginx reaches them as well, without keeping connections."""
        return range(self._ports.workers[-1] + 1, 65535)

