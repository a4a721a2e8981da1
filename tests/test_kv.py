"""The KV tier between vLLM's real offloading classes and a real redis: names, bytes, faults. No engine.

Two "engines" are two sets of vLLM's manager, host region and our CPU worker; their KV tensors are small.
"""

import dataclasses
import hashlib
import inspect
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm.v1.kv_offload.base import (
    CanonicalKVCacheRef,
    CanonicalKVCaches,
    CanonicalKVCacheTensor,
    GPULoadStoreSpec,
    LookupResult,
    OffloadingWorker,
    ReqContext,
    ScheduleEndContext,
    make_offload_key,
)
from vllm.v1.kv_offload.config import (
    OffloadingCacheConfig,
    OffloadingConfig,
    OffloadingGroupConfig,
    OffloadingModelConfig,
    OffloadingParallelConfig,
)
from vllm.v1.kv_offload.factory import OffloadingSpecFactory
from vllm.v1.kv_offload.tiering.async_lookup import AsyncLookupManager
from vllm.v1.kv_offload.tiering.base import JobResult, SecondaryTierManager, TransferJob

from common.breaker import Breaker
from services.worker.identity import adapter_digest, model_digest
from services.worker.vllm import shm
from services.worker.vllm.kv import tier
from services.worker.vllm.kv.block import HEADER, PREFIX, Layout, Sealer
from services.worker.vllm.kv.connector import RedisOffloadingConnector
from services.worker.vllm.kv.economy import FORGET_S, Economy
from services.worker.vllm.kv.tier import Adapter, RedisTier
from services.worker.vllm.kv.wire import Wire
from tests.harness import Cache, wait_for

LAYERS, BLOCKS, PAGE, BLOCKS_PER_CHUNK = 4, 32, 4096, 2
CHUNK = LAYERS * PAGE * BLOCKS_PER_CHUNK
LAYOUT = Layout(
    platform="cpu x", attention="CPU_ATTN X86 vec", model="00ff", dtype="torch.bfloat16", kv_dtype="auto",
    quantization="None", layers=("a", "b"), tokens_per_block=128, blocks_per_chunk=1, kv_layout="LBHNC", row_bytes=4096,
    tensor_parallel=1, pipeline_parallel=1, context_parallel=1, hash_algorithm="sha256_cbor", overrides="", vllm="0.32",
)


def wired(cache: Cache) -> Wire:
    return Wire(cache.url, "worker", cache.password)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cache]:
    short = Path("/tmp") / f"kv-{os.getpid()}-{time.monotonic_ns() % 10**9}"  # a socket's path is short
    short.mkdir()
    found = Cache(short)
    for name, value in {
        "CACHE_REDIS_URL": found.url, "REDIS_URL": found.url, "KV_TIER": "redis", "MODEL": "/m",
        "KV_SECRET_FILE": str(short / "secrets/worker/kv_secret"),
        "REDIS_PASSWORD_FILE": str(short / "secrets/worker/redis_password"),
        "WORKER_TOKEN_FILE": str(short / "secrets/worker/worker_token"),
    }.items():
        monkeypatch.setenv(name, value)
    yield found
    found.process.send_signal(signal.SIGCONT)
    found.kill()
    subprocess.run(["rm", "-rf", short], check=True)


class Engine:
    """What the tier sees of an engine: vLLM's manager and the ranks' workers, moved step by step."""

    def __init__(self, name: str, *, namespace: bytes = b"n" * 16, ranks: int = 1, chunks: int = 8) -> None:
        def config(rank: int) -> OffloadingConfig:
            return OffloadingConfig(
                groups=(OffloadingGroupConfig(128, tuple(f"l{i}" for i in range(LAYERS)), 0),),
                worker_kv_bytes_per_block=LAYERS * PAGE, enable_kv_cache_events=False,
                extra_config={
                    "spec_name": "RedisTieringSpec", "spec_module_path": "services.worker.vllm.kv.spec",
                    "cpu_bytes_to_use": chunks * CHUNK * ranks,
                    "secondary_tiers": [{"type": "RedisTier", "module_path": "services.worker.vllm.kv.tier",
                                         "namespace": namespace.hex()}],
                },
                engine_id=f"owngpt-{os.getpid()}-{name}{time.monotonic_ns()}", model=OffloadingModelConfig("m", "bfloat16"),
                cache=OffloadingCacheConfig(128, BLOCKS_PER_CHUNK),
                parallel=OffloadingParallelConfig(rank, ranks, ranks, 1, 1, 1, 0, 1, None, False), kv_cache_layout="LBHNC",
            )

        first = config(0)
        self.manager = OffloadingSpecFactory.create_spec(first).get_manager()
        self.kv, self.workers = [], []
        for rank in range(ranks):
            tensors = [torch.randint(-128, 127, (BLOCKS, PAGE), dtype=torch.int8) for _ in range(LAYERS)]
            caches = CanonicalKVCaches([CanonicalKVCacheTensor(t, PAGE) for t in tensors],
                                       [[CanonicalKVCacheRef(i, PAGE) for i in range(LAYERS)]])
            spec = OffloadingSpecFactory.create_spec(dataclasses.replace(config(rank), engine_id=first.engine_id))
            self.kv.append(tensors)
            self.workers.append(spec.get_worker(caches))
        self.tier: RedisTier = self.manager.secondary_tiers[0]
        self.jobs = 0

    def store(self, keys: list, blocks: list[int], adapter: bytes = b"") -> None:
        """Compute `keys` in device blocks and let them cascade."""
        self.jobs += 1
        context = ReqContext(f"s{self.jobs}")
        if adapter:
            context.set_state(Adapter(adapter))
        self.manager.on_new_request(context)
        out = self.manager.prepare_store(keys, context)
        if out is not None and out.keys_to_store:
            kept = [b for k, pair in zip(keys, zip(blocks[::2], blocks[1::2], strict=True), strict=True)
                    if k in out.keys_to_store for b in pair]
            for worker in self.workers:
                worker.submit_store(self.jobs, GPULoadStoreSpec(kept, [len(kept)], [0]), out.store_spec)
                assert worker.get_finished()[0].success
            self.manager.complete_store(out.keys_to_store, context)
        self.manager.on_request_finished(context)
        self.settle()

    def settle(self) -> None:
        until = time.monotonic() + 10
        while self.manager.has_pending_work() and time.monotonic() < until:
            self.step()
        assert not self.manager.has_pending_work()

    def step(self) -> None:
        self.manager.on_schedule_end(ScheduleEndContext([], []))
        time.sleep(0.001)

    def load(self, keys: list, blocks: list[int], adapter: bytes = b"") -> int:
        """Ask for a prompt's chunks until vLLM would schedule it; returns how many of them came from elsewhere."""
        self.jobs += 1
        context = ReqContext(f"l{self.jobs}")
        if adapter:
            context.set_state(Adapter(adapter))
        self.manager.on_new_request(context)
        until = time.monotonic() + 10
        while True:
            assert time.monotonic() < until, "the lookup never resolves"
            found = []
            for key in keys:
                found.append(self.manager.lookup(key, context))
                if found[-1] is LookupResult.MISS:
                    break
            if all(result in (LookupResult.HIT, LookupResult.MISS) for result in found):
                break
            self.step()
        count = found.count(LookupResult.HIT)
        if count:
            spec = self.manager.prepare_load(keys[:count], context)
            wanted = blocks[: count * BLOCKS_PER_CHUNK]
            for worker in self.workers:
                worker.submit_load(self.jobs, spec, GPULoadStoreSpec(wanted, [len(wanted)], [0]))
                assert worker.get_finished()[0].success
            self.manager.complete_load(keys[:count], context)
        self.manager.on_request_finished(context)
        self.settle()
        return count

    def counts(self) -> dict[str, float]:
        stats = self.tier.get_stats()
        return {labels[0]: value for labels, value in stats.data["data"].get("owngpt_kv_blocks", {}).items()} if stats else {}

    def close(self) -> None:
        self.manager.shutdown()
        for worker in self.workers:
            worker.shutdown()


@pytest.fixture
def engine(cache: Cache) -> Iterator[Callable[..., Engine]]:
    made: list[Engine] = []

    def make(name: str, **kwargs: object) -> Engine:
        made.append(Engine(name, **kwargs))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for each in made:
        each.close()


def keys(count: int, salt: bytes = b"") -> list:
    return [make_offload_key(hashlib.sha256(salt + bytes([i])).digest(), 0) for i in range(count)]


def same(a: Engine, b: Engine, count: int, at: int = 0, to: int = 16) -> bool:
    width = count * BLOCKS_PER_CHUNK
    return all(torch.equal(x[at : at + width], y[to : to + width])
               for xs, ys in zip(a.kv, b.kv, strict=True) for x, y in zip(xs, ys, strict=True))


class TestBlock:
    @pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(Layout)])
    def test_each_field_of_the_layout_changes_the_namespace(self, field: str) -> None:
        value = getattr(LAYOUT, field)
        other = value + 1 if isinstance(value, int) else (*value, "c") if isinstance(value, tuple) else value + "x"
        assert dataclasses.replace(LAYOUT, **{field: other}).namespace() != LAYOUT.namespace()

    def test_the_namespace_is_the_same_in_every_process(self) -> None:
        assert LAYOUT.namespace() == dataclasses.replace(LAYOUT).namespace()
        assert len(LAYOUT.namespace()) == 16

    def test_names_differ_by_secret_namespace_key_and_adapter(self) -> None:
        names = {Sealer(s * 24, n * 16).name(k, a) for s in "xy" for n in (b"1", b"2") for k in (b"k", b"l") for a in (b"", b"a")}
        assert len(names) == 16
        assert all(name.startswith(PREFIX) for name in names)

    @given(st.binary(min_size=1, max_size=200), st.integers(0, 10**6), st.integers(1, 255))
    def test_any_flipped_byte_is_noticed(self, payload: bytes, at: int, flip: int) -> None:
        sealer = Sealer("s" * 24, b"n" * 16)
        value = bytearray(sealer.seal(b"name", memoryview(payload)) + payload)
        assert sealer.verifies(b"name", bytes(value[: HEADER.size]), memoryview(value)[HEADER.size :])
        at %= len(value)
        if HEADER.size - 16 <= at < HEADER.size:
            return  # padding
        value[at] ^= flip
        assert not sealer.verifies(b"name", bytes(value[: HEADER.size]), memoryview(value)[HEADER.size :])

    def test_a_block_under_another_name_or_secret_does_not_verify(self) -> None:
        payload = memoryview(b"x" * 100)
        header = Sealer("s" * 24, b"n" * 16).seal(b"a", payload)
        assert not Sealer("s" * 24, b"n" * 16).verifies(b"b", header, payload)
        assert not Sealer("t" * 24, b"n" * 16).verifies(b"a", header, payload)
        assert not Sealer("s" * 24, b"n" * 16).verifies(b"a", header, payload[:99])


class TestIdentity:
    def test_every_file_of_a_checkpoint_counts(self, tmp_path: Path) -> None:
        def digest() -> str:
            model_digest.cache_clear()
            return model_digest(str(tmp_path))

        (tmp_path / "model.safetensors").write_bytes(b"w" * 5000)
        (tmp_path / "config.json").write_text("{}")
        seen = {digest()}
        (tmp_path / "model.safetensors").write_bytes(b"w" * 4999 + b"x")
        seen.add(digest())
        (tmp_path / "config.json").write_text("{ }")
        seen.add(digest())
        (tmp_path / "chat_template.jinja").write_text("")
        seen.add(digest())
        assert len(seen) == 4
        (tmp_path / "README.md").write_text("words")
        assert digest() in seen

    def test_a_hub_snapshot_is_known_by_its_links(self, tmp_path: Path) -> None:
        (tmp_path / "blobs").mkdir()
        for number, name in enumerate("ab"):
            (tmp_path / f"blobs/{name * 64}").write_bytes(b"same")
            (tmp_path / f"s{number}").mkdir()
            (tmp_path / f"s{number}/model.safetensors").symlink_to(f"../blobs/{name * 64}")
        assert model_digest(str(tmp_path / "s0")) != model_digest(str(tmp_path / "s1"))

    def test_an_adapter_trained_again_in_the_same_place_is_another(self, tmp_path: Path) -> None:
        file = tmp_path / "adapter_model.safetensors"
        file.write_bytes(b"1" * 100)
        first = adapter_digest(str(tmp_path))
        assert adapter_digest(str(tmp_path)) == first
        file.write_bytes(b"2" * 100)
        assert adapter_digest(str(tmp_path)) != first

    def test_an_adapter_that_is_no_folder_is_shared_with_nobody(self) -> None:
        assert adapter_digest("org/adapter") != adapter_digest("org/adapter")


class TestEconomy:
    def test_fetching_pays_until_measured_otherwise(self) -> None:
        now = [0.0]
        economy = Economy(lambda: now[0])
        assert economy.pays(128, 10**6)
        economy.prefilled(1000, 1.0)  # a token in 1 ms
        economy.fetched(10**6, 0.01)  # 100 MB/s
        assert economy.pays(100, 9 * 10**6)
        assert not economy.pays(100, 11 * 10**6)
        economy.looked_up(0.05)
        assert not economy.pays(100, 6 * 10**6)

    def test_a_verdict_is_put_to_the_test_again(self) -> None:
        now = [0.0]
        economy = Economy(lambda: now[0])
        economy.prefilled(1000, 1.0)
        economy.fetched(1000, 10.0)
        assert not economy.pays(100, 1000)
        now[0] = FORGET_S + 1
        assert economy.pays(100, 1000)

    def test_the_breaker_waits_longer_each_time_and_closes_when_it_works(self) -> None:
        now = [0.0]
        breaker = Breaker(lambda: now[0])
        pauses = []
        for _ in range(7):
            breaker.failed()
            began = now[0]
            while breaker.open:
                now[0] += 0.5
            pauses.append(now[0] - began)
        assert pauses == [1, 2, 4, 8, 16, 30, 30]
        assert breaker.worked()
        assert not breaker.worked()
        assert breaker.failed()
        assert breaker.open


class TestWire:
    def test_values_travel_whole(self, cache: Cache) -> None:
        wire, sent = wired(cache), os.urandom(3_000_000)
        assert wire.store([(b"kv:a", b"h" * 64, memoryview(sent)), (b"kv:b", b"i" * 64, memoryview(b"short"))], 60) == [True, True]
        assert wire.sizes([b"kv:a", b"kv:no", b"kv:b"]) == [3_000_064, 0, 69]
        slots = [memoryview(bytearray(3_000_000)), memoryview(bytearray(7)), memoryview(bytearray(5)), memoryview(bytearray(9))]
        names = [b"kv:a", b"kv:no", b"kv:b", b"kv:b"]
        headers = wire.load(list(zip(names, slots, strict=True)), 64, 60)
        assert headers == [b"h" * 64, None, b"i" * 64, None]  # the last has another size
        assert bytes(slots[0]) == sent
        assert wire.sizes([b"kv:a"]) == [3_000_064]  # still in step
        wire.close()

    def test_life_is_renewed_by_use(self, cache: Cache) -> None:
        wire = wired(cache)
        wire.store([(b"kv:a", b"", memoryview(b"x"))], 60)
        wire.load([(b"kv:a", memoryview(bytearray(1)))], 0, 600)
        assert 590 < cache.client().ttl("kv:a") <= 600
        wire.refresh([b"kv:a", b"kv:no"], 6000)
        assert 5990 < cache.client().ttl("kv:a") <= 6000
        wire.close()

    def test_seen(self, cache: Cache) -> None:
        wire = wired(cache)
        assert wire.see([b"kvseen:a", b"kvseen:b"], 60) == [False, False]
        assert wire.see([b"kvseen:b", b"kvseen:c"], 60) == [True, False]
        assert 0 < wire.fill() < 0.5
        wire.close()

    def test_a_frozen_server_is_given_up_soon(self, cache: Cache) -> None:
        wire = wired(cache)
        cache.process.send_signal(signal.SIGSTOP)
        began = time.monotonic()
        with pytest.raises(OSError, match="without enough bytes"):
            wire.load([(b"kv:a", memoryview(bytearray(10_000_000)))], 64, 60)
        assert time.monotonic() - began < 2.0

    def test_the_worker_user_may_do_nothing_else(self, cache: Cache) -> None:
        client = cache.client("worker")
        # Answers it may write and not read; how long one is, redis tells whoever may write it.
        for command in (["get", "kv:a"], ["set", "other:a", "x"], ["getex", "answer:a"], ["flushall"], ["keys", "*"], ["config", "get", "*"]):
            with pytest.raises(Exception, match=r"(?i)permission"):
                client.execute_command(*command)


class TestTier:
    def test_what_one_engine_computed_another_loads(self, engine: Callable[..., Engine]) -> None:
        a, b = engine("a"), engine("b")
        a.store(keys(3), [0, 1, 2, 3, 4, 5])
        assert b.load(keys(3), [16, 17, 18, 19, 20, 21]) == 3
        assert same(a, b, 3)
        assert b.counts() == {"loaded": 3}
        assert a.counts()["stored"] == 3

    def test_a_longer_prompt_loads_what_is_there(self, engine: Callable[..., Engine]) -> None:
        a, b = engine("a"), engine("b")
        a.store(keys(3), [0, 1, 2, 3, 4, 5])
        assert b.load(keys(5), list(range(16, 26))) == 3
        assert same(a, b, 3)

    def test_a_prompt_with_more_chunks_than_the_host_tier(self, engine: Callable[..., Engine]) -> None:
        """It pushed out its own first chunk with each load: 18,856 loads in 8.7 s, and nothing was used (B9)."""
        a, b = engine("a", chunks=16), engine("b", chunks=5)
        a.store(keys(6), list(range(12)))
        assert b.tier.host_chunks == 5
        connector = object.__new__(RedisOffloadingConnector)
        connector._tier, connector._chunk_tokens, connector._bounding_group_ids = b.tier, 256, ()
        wanted = {tokens: connector._max_loadable_tokens(SimpleNamespace(num_tokens=tokens), 0)
                  for tokens in (100, 300, 6 * 256 + 1, 100_000)}
        assert wanted == {100: 0, 300: 256, 6 * 256 + 1: 512, 100_000: 512}
        for _ in range(3):
            assert b.load(keys(6)[: wanted[100_000] // 256], list(range(16, 28))) == 2

    def test_many_chunks_go_in_stripes(self, engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tier, "STRIPE_BYTES", 2 * CHUNK)
        a, b = engine("a", chunks=14), engine("b", chunks=14)
        a.store(keys(12)[:6], list(range(12)))
        a.store(keys(12)[6:], list(range(12, 24)))
        assert b.load(keys(12), [*range(8, 32)]) == 12
        assert same(a, b, 12, 0, 8)

    def test_ranks_of_a_tensor_parallel_engine_keep_their_parts_apart(self, engine: Callable[..., Engine]) -> None:
        a, b = engine("a", ranks=3), engine("b", ranks=3)
        a.store(keys(3), [0, 1, 2, 3, 4, 5])
        assert b.load(keys(3), [16, 17, 18, 19, 20, 21]) == 3
        assert same(a, b, 3)

    def test_another_namespace_shares_nothing(self, engine: Callable[..., Engine]) -> None:
        engine("a").store(keys(3), [0, 1, 2, 3, 4, 5])
        assert engine("b", namespace=b"m" * 16).load(keys(3), list(range(6))) == 0

    def test_adapters_with_other_files_share_nothing(self, engine: Callable[..., Engine]) -> None:
        a, b = engine("a"), engine("b")
        a.store(keys(2), [0, 1, 2, 3], adapter=b"one")
        assert b.load(keys(2), list(range(4)), adapter=b"two") == 0
        assert b.load(keys(2), list(range(4))) == 0
        assert b.load(keys(2), [16, 17, 18, 19], adapter=b"one") == 2
        assert same(a, b, 2)

    @pytest.mark.parametrize("damage", ["flip", "short", "long", "empty", "garbage", "swap", "list"])
    def test_a_damaged_block_and_what_follows_it_is_computed(
        self, engine: Callable[..., Engine], cache: Cache, damage: str
    ) -> None:
        a, b = engine("a"), engine("b")
        a.store(keys(3), [0, 1, 2, 3, 4, 5])
        names = [a.tier._sealer.name(key) for key in keys(3)]
        wire = wired(cache)
        values = {}
        for name in names:
            slot = memoryview(bytearray(CHUNK))
            values[name] = bytearray((wire.load([(name, slot)], HEADER.size, 60)[0] or b"") + bytes(slot))
        bad = {
            "flip": lambda v: v[:500] + bytes([v[500] ^ 1]) + v[501:], "short": lambda v: v[:-1], "long": lambda v: v + b"x",
            "empty": lambda v: b"", "garbage": lambda v: os.urandom(len(v)), "swap": lambda v: values[names[2]],
            "list": lambda v: v[:64],
        }[damage](values[names[1]])
        wire.store([(names[1], b"", memoryview(bytes(bad)))], 60)
        wire.close()
        assert b.load(keys(3), [16, 17, 18, 19, 20, 21]) == 1
        assert same(a, b, 1)
        b.manager.reset_cache()
        b.store(keys(3), [16, 17, 18, 19, 20, 21])  # computed by b: what was damaged is written over
        a.manager.reset_cache()
        assert a.load(keys(3), [16, 17, 18, 19, 20, 21]) == 3

    def test_redis_dead_frozen_restarted(self, engine: Callable[..., Engine], cache: Cache) -> None:
        a, b = engine("a"), engine("b")
        a.store(keys(3), [0, 1, 2, 3, 4, 5])
        cache.process.send_signal(signal.SIGSTOP)
        began = time.monotonic()
        assert b.load(keys(3), list(range(6))) == 0
        assert time.monotonic() - began < 2.5
        b.store(keys(2, b"frozen"), [0, 1, 2, 3])
        cache.process.send_signal(signal.SIGCONT)
        wait_for(lambda: not b.tier._breaker.open, "tried again")
        b.manager.reset_cache()
        assert b.load(keys(3), [16, 17, 18, 19, 20, 21]) == 3
        cache.kill()
        b.manager.reset_cache()
        assert b.load(keys(3), list(range(6))) == 0
        a.store(keys(2, b"dead"), [0, 1, 2, 3])
        cache.start()
        wait_for(lambda: not a.tier._breaker.open and not b.tier._breaker.open, "tried again", 15)
        a.manager.reset_cache()
        a.store(keys(3), [0, 1, 2, 3, 4, 5])
        assert b.load(keys(3), [16, 17, 18, 19, 20, 21]) == 3
        assert same(a, b, 3)

    def test_an_idle_scheduler_waits_for_loads_only(
        self, engine: Callable[..., Engine], cache: Cache, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        b = engine("b")
        began = time.monotonic()
        b.tier.await_load(5)
        assert time.monotonic() - began < 0.1
        monkeypatch.setattr(b.tier, "look_up", lambda asked, context: [True] * len(asked))
        cache.process.send_signal(signal.SIGSTOP)
        context = ReqContext("x")
        b.manager.on_new_request(context)
        while not b.tier._jobs:
            b.manager.lookup(keys(1)[0], context)
            b.step()
        began = time.monotonic()
        b.tier.await_load(0.2)
        assert 0.2 <= time.monotonic() - began < 0.4
        cache.process.send_signal(signal.SIGCONT)
        began = time.monotonic()
        b.tier.await_load(5)
        assert time.monotonic() - began < 2
        b.manager.on_request_finished(context)
        b.settle()

    def test_a_restart_between_two_conversations_costs_nothing(self, engine: Callable[..., Engine], cache: Cache) -> None:
        a = engine("a")
        a.store(keys(1), [0, 1])
        cache.kill()
        cache.start()
        a.store(keys(1, b"next"), [0, 1])
        assert a.counts() == {"stored": 2}

    def test_evicted_between_lookup_and_load(self, engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch) -> None:
        a, b = engine("a"), engine("b")
        a.store(keys(1), [0, 1])
        monkeypatch.setattr(b.tier, "look_up", lambda asked, context: [True] * len(asked))
        assert b.load(keys(3), list(range(6))) == 1
        assert b.counts() == {"loaded": 1, "lost": 2}

    def test_a_backlog_is_shed_and_never_waits(self, engine: Callable[..., Engine], cache: Cache) -> None:
        a = engine("a")
        cache.process.send_signal(signal.SIGSTOP)
        began = time.monotonic()
        context = ReqContext("x")
        a.manager.on_new_request(context)
        for number in range(4):
            wanted = keys(2, bytes([number]))
            out = a.manager.prepare_store(wanted, context)
            if out is None:
                continue
            a.workers[0].submit_store(number, GPULoadStoreSpec([0, 1, 2, 3], [4], [0]), out.store_spec)
            a.manager.complete_store(wanted, context)
        assert time.monotonic() - began < 0.2
        a.manager.on_request_finished(context)
        cache.process.send_signal(signal.SIGCONT)
        a.settle()
        counts = a.counts()
        assert counts["shed"] >= 2
        assert counts.get("stored", 0) + counts["shed"] == 8

    def test_when_crowded_only_what_is_computed_twice_is_admitted(
        self, engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        a, b = engine("a"), engine("b")
        monkeypatch.setattr(Wire, "fill", lambda self: 0.9)
        a.store(keys(2), [0, 1, 2, 3])
        assert a.counts() == {"not_admitted": 2}
        b.store([*keys(2)[:1], *keys(1, b"other")], [0, 1, 2, 3])
        assert b.counts() == {"stored": 1, "not_admitted": 1}

    def test_what_redis_has_is_not_sent_again(self, engine: Callable[..., Engine]) -> None:
        a, b = engine("a"), engine("b")
        a.store(keys(2), [0, 1, 2, 3])
        b.store(keys(3), [0, 1, 2, 3, 4, 5])
        assert b.counts() == {"present": 2, "stored": 1}

    def test_fetching_that_would_lose_is_a_miss(self, engine: Callable[..., Engine]) -> None:
        a, b = engine("a"), engine("b")
        a.store(keys(2), [0, 1, 2, 3])
        b.tier.economy.prefilled(10**9, 0.001)
        b.tier.economy.fetched(1, 1.0)
        assert b.load(keys(2), list(range(4))) == 0
        assert b.counts() == {"not_worth_it": 2}

    def test_a_small_redis_evicts_and_nobody_notices(self, engine: Callable[..., Engine], cache: Cache) -> None:
        cache.kill()
        cache.start("4mb")
        a, b = engine("a"), engine("b")
        for number in range(100):
            a.store(keys(3, bytes([number])), [0, 1, 2, 3, 4, 5])
        hits = [b.load(keys(3, bytes([number])), [16, 17, 18, 19, 20, 21]) for number in range(100)]
        assert 0 <= sum(hits) < 300

    def test_values_cost_what_the_blocks_cost(self, engine: Callable[..., Engine], cache: Cache) -> None:
        a = engine("a")
        a.store(keys(3), [0, 1, 2, 3, 4, 5])
        wire = wired(cache)
        sizes = wire.sizes([a.tier._sealer.name(key) for key in keys(3)])
        wire.close()
        assert sizes == [CHUNK + HEADER.size] * 3

    def test_use_in_a_nearer_tier_keeps_blocks_alive(self, engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch) -> None:
        a = engine("a")
        refreshed: list[list[bytes]] = []
        monkeypatch.setattr(Wire, "refresh", lambda self, names, ttl_s: refreshed.append(list(names)))
        a.tier.touch(keys(2), ReqContext("r"))
        a.tier.touch(keys(3), ReqContext("r"))
        a.tier.drain_jobs()
        assert [len(names) for names in refreshed] == [2, 1]

    def test_reset_and_shutdown_leave_nothing(self, engine: Callable[..., Engine]) -> None:
        a = engine("a")
        a.store(keys(2), [0, 1, 2, 3])
        a.manager.reset_cache()
        assert a.load(keys(2), [16, 17, 18, 19]) == 2
        path = Path(a.workers[0]._region.mmap_path)
        assert path.exists()
        a.close()
        assert not path.exists()
        a.close = lambda: None  # type: ignore[method-assign]


def test_shared_memory_of_killed_engines_is_swept(tmp_path: Path) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    agent = subprocess.Popen(["bash", "-c", "exec -a services.worker sleep 60"])
    wait_for(lambda: b"services.worker" in Path(f"/proc/{agent.pid}/cmdline").read_bytes(), "the agent's name")
    for pid in (gone.pid, agent.pid, 1):
        (tmp_path / f"vllm_offload_owngpt-{pid}-ab.mmap").write_bytes(b"x" * 8192)
    (tmp_path / "vllm_offload_somebody.mmap").write_bytes(b"x")
    assert shm.sweep(tmp_path) > 0
    agent.kill()
    agent.wait()
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        f"vllm_offload_owngpt-{agent.pid}-ab.mmap", "vllm_offload_somebody.mmap"]


SIGNATURES = {
    (SecondaryTierManager, "__init__"): "(self, offloading_spec, primary_kv_view, tier_type, backpressure_detector)",
    (SecondaryTierManager, "lookup"): "(self, key, req_context)",
    (SecondaryTierManager, "submit_store"): "(self, job_metadata)",
    (SecondaryTierManager, "submit_load"): "(self, job_metadata)",
    (SecondaryTierManager, "get_finished_jobs"): "(self)",
    (SecondaryTierManager, "touch"): "(self, keys, req_context)",
    (SecondaryTierManager, "on_new_request"): "(self, req_context)",
    (SecondaryTierManager, "on_request_finished"): "(self, req_context)",
    (SecondaryTierManager, "on_schedule_end"): "(self, context)",
    (SecondaryTierManager, "drain_jobs"): "(self)",
    (SecondaryTierManager, "get_stats"): "(self)",
    (AsyncLookupManager, "batch_lookup"): "(self, keys, req_context)",
    (AsyncLookupManager, "mark_miss"): "(self, keys)",
    (OffloadingWorker, "submit_store"): "(self, job_id, src_spec, dst_spec)",
    (OffloadingWorker, "submit_load"): "(self, job_id, src_spec, dst_spec)",
    (OffloadingWorker, "get_finished"): "(self)",
    (OffloadingWorker, "wait"): "(self, job_ids)",
    (JobResult, "__init__"): "(self, job_id, success, successful_keys, transfer_time, transfer_bytes)",
    (TransferJob, "__init__"): "(self, job_id, keys, chunk_ids, is_promotion, req_context, submit_time)",
}


class TestContract:
    """vLLM 0.32's offloading is experimental: these say at once what a newer one changed."""

    @pytest.mark.parametrize(("where", "expected"), SIGNATURES.items(), ids=lambda v: f"{v[0].__name__}.{v[1]}" if isinstance(v, tuple) else "")
    def test_signatures(self, where: tuple[type, str], expected: str) -> None:
        found = inspect.signature(getattr(*where)).parameters
        assert f"({', '.join(found)})" == expected

    def test_nothing_abstract_is_left_open(self) -> None:
        from services.worker.vllm.kv.cpu_worker import CpuPlatformWorker

        assert not RedisTier.__abstractmethods__
        assert not CpuPlatformWorker.__abstractmethods__

    def test_the_connector_overrides_what_exists(self) -> None:
        from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import OffloadingConnector

        from services.worker.vllm.kv.connector import RedisOffloadingConnector

        for name in ("on_new_request", "_max_loadable_tokens", "get_num_new_matched_tokens", "build_connector_meta",
                     "get_kv_connector_stats"):
            mine, theirs = getattr(RedisOffloadingConnector, name), getattr(OffloadingConnector, name)
            assert list(inspect.signature(mine).parameters) == list(inspect.signature(theirs).parameters), name

    def test_the_engine_meets_each_cpu_layout_under_its_own_name(self) -> None:
        from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

        assert list(inspect.signature(_get_attn_isa).parameters) == ["dtype", "block_size", "head_size", "kv_cache_dtype"]
        assert _get_attn_isa(torch.bfloat16, 128, 64, "auto") != _get_attn_isa(torch.bfloat16, 16, 80, "auto")
