"""A store behind the host: the tokens of transformers, after a restart too, whatever the store does."""

import gc
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import conversations
import numpy as np
import pytest
from conversations import FAMILIES, HALF, LONG, ask, go_on, tiered
from idle import check_idle, evict, settle

import rootcellar
from rootcellar.cache import Tier
from rootcellar.engine import storage
from rootcellar.errors import CacheBusy, ConfigError, EngineError, RequestError
from rootcellar.models.config import load_config
from rootcellar.models.loader import load_params
from rootcellar.scheduler import Rates, TierRate
from rootcellar.tiers import mover
from rootcellar.tiers.faulty import Faults, FaultyStore
from rootcellar.tiers.stores import registry
from rootcellar.tiers.stores.file import FileStore
from rootcellar.tiers.stores.file_settings import read_settings


@pytest.fixture
def pages(tmp_path):
    """The settings of a file store of its own."""
    return {"path": str(tmp_path / "pages"), "min_free_space": 0, "max_size": "64MiB", "prefetch_threshold": 16}


def engine(folder, pages=None, **options):
    options = {"hicache_ratio": 4.0, "hicache_storage_prefetch_policy": "wait_complete", **options}
    running = tiered(folder, **options)
    if pages is not None:
        running.attach_storage("file", pages)
    return running


def begin(engine, case, prompts=LONG):
    """The first half of each answer, with all that it left in the store."""
    conversations.begin(engine, case, prompts)
    settle(engine)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_server_started_again_on_its_store_hits_what_was_cached_before(case_of, pages, name):
    case, folder = case_of(name)
    with engine(folder, pages) as running:
        begin(running, case)
        given = go_on(running, case)  # from the device: nothing was forgotten
        assert all(details["storage"] == 0 < details["device"] for details in given)
        check_idle(running)  # which flushes the device and the host
        again = go_on(running, case)
        assert all(details["storage"] > 0 for details in again)
    with engine(folder, pages) as running:
        after = go_on(running, case)
        assert after == again
        assert running.stats()["copies"]["storage-host"]["bytes"] > 0
        check_idle(running)


def test_what_was_cached_is_counted_once_and_is_less_than_the_prompt(case_of, pages):
    """Whatever tier it came from, and though all of the prompt was computed before."""
    case, folder = case_of("qwen2-4kv")
    prompt = case.prompts[15][:96]  # whole pages
    with engine(folder, pages) as running:
        for there in ("nowhere", "device", "host", "storage", "device"):
            if there == "host":
                settle(running)
                evict(running, Tier.DEVICE)
            elif there == "storage":
                running.flush_cache()
            meta = ask(running, prompt, 1)["meta_info"]
            expected = dict.fromkeys(("device", "host", "storage"), 0)
            if there != "nowhere":
                expected[there] = 80
            assert meta["cached_tokens_details"] == expected
            assert meta["cached_tokens"] == sum(expected.values()) < meta["prompt_tokens"] == 96
        check_idle(running)


def test_what_one_attention_backend_wrote_another_reads(case_of, pages):
    case, folder = case_of("qwen2-4kv")
    with engine(folder, pages, attention_backend="native") as running:
        begin(running, case)
    with engine(folder, pages, attention_backend="xla") as running:
        assert all(details["storage"] > 0 for details in go_on(running, case))
        check_idle(running)


@pytest.mark.parametrize("other", [{"kv_cache_dtype": "bfloat16"}, {"page_size": 8}], ids=["dtype", "page size"])
def test_pages_of_another_kind_are_no_hits(case_of, pages, other):
    case, folder = case_of("qwen2-4kv")
    with engine(folder, pages) as running:
        begin(running, case)
    with engine(folder, pages, **other) as running:
        prompt = case.prompts[15] + case.tokens[15][:HALF]
        assert ask(running, prompt, 1)["meta_info"]["cached_tokens"] == 0


def test_what_another_tenant_or_salt_stored_is_no_hit(case_of, pages):
    case, folder = case_of("qwen2-4kv")
    with engine(folder, pages) as running:
        begin(running, case)
        running.flush_cache()
        for option in ({"cache_salt": "x"}, {"extra_key": "x"}, {"tenant": "x"}):
            answer = running.generate(input_ids=case.prompts[15], sampling_params={"max_new_tokens": 1}, **option)
            assert answer["meta_info"]["cached_tokens"] == 0


def test_other_weights_hit_nothing_that_was_stored_before(case_of, pages, tmp_path):
    case, folder = case_of("qwen2-4kv")
    with engine(folder, pages) as running:
        begin(running, case)
        running.update_weights(load_params(folder, load_config(folder), np.float32), weights_name="others")
        assert ask(running, case.prompts[15], 1)["meta_info"]["cached_tokens"] == 0


def test_all_that_a_full_device_leaves_waits_for_a_slow_store(case_of, pages, monkeypatch):
    """Nothing of it has to be left by another request again, however small the engine is."""
    case, folder = case_of("qwen2-4kv")
    gate, put = threading.Event(), FileStore.put
    monkeypatch.setattr(FileStore, "put", lambda *given: gate.wait(60) and put(*given))
    prompts = [[i, *case.prompts[15] * 2][:144] for i in range(3)]
    with engine(folder, pages, hicache_ratio=2.0) as running:
        ask(running, prompts, 1)
        (image,) = (copier.image.nbytes for copier in running._parts.runner.copiers.values())
        met = 0
        while met < 3 * 144 // 16:  # each page was copied to the host, and then queued for the store or left out
            lane = running.stats()["copies"]["host-storage"]
            met = lane["queued_bytes"] // image + lane["skipped_pages"]
            time.sleep(0.01)
        assert lane["skipped_pages"] == 0
        gate.set()
        settle(running)
        assert held(running, Tier.STORAGE) == held(running, Tier.HOST) == 3 * 144
        check_idle(running)


def test_a_store_is_attached_and_taken_away_while_requests_run(case_of, pages):
    case, folder = case_of("qwen2-4kv")
    with engine(folder) as running:
        begin(running, case)  # on the host, before there is a store
        answers = iter(
            running.generate(
                input_ids=case.prompts[11], sampling_params={"max_new_tokens": 64, "temperature": 0}, stream=True
            )
        )
        next(answers)
        status = running.attach_storage("file", pages)
        assert status["hicache_storage_backend"] == "file"
        with pytest.raises(ConfigError, match="attached already"):
            running.attach_storage("file", pages)
        # Whoever leaves a prefix that only the host has gives it to the store; the answer beside goes on leaving more.
        for _ in range(20):
            go_on(running, case)
            settle(running)
            host = held(running, Tier.HOST)
            if held(running, Tier.STORAGE) == host:
                break
        else:
            pytest.fail(f"the store has {held(running, Tier.STORAGE)} pages of {host}")
        running.attach_storage("file", pages, prefetch_policy="timeout", replace=True)
        assert running.detach_storage()
        assert not running.detach_storage()
        assert running.storage.status()["hicache_storage_backend"] is None
        *_, last = answers
        assert last["output_ids"] == case.tokens[11][: len(last["output_ids"])]
        settle(running)
        assert held(running, Tier.STORAGE) == 0
        assert held(running, Tier.HOST) >= host
        check_idle(running)
        assert all(details["storage"] == 0 for details in go_on(running, case))
        running.flush_cache()
        running.attach_storage("file", pages)
        assert all(details["storage"] > 0 for details in go_on(running, case))
        check_idle(running)


def held(engine, tier):
    shelves = engine._loop.call(lambda: engine._cache.stats().shelves)
    return sum(shelf.used for (_, where), shelf in shelves.items() if where is tier)


def test_at_the_end_what_only_the_device_has_is_saved_where_that_is_asked_for(case_of, pages):
    case, folder = case_of("qwen2-4kv")
    options = {"hicache_write_policy": "write_back", "hicache_ratio": 0.3}
    for save in (False, True):
        with engine(folder, pages, hicache_storage_save_on_exit=save, **options) as running:
            found = go_on(running, case)
            assert all(details["storage"] == 0 for details in found)
    with engine(folder, pages, **options) as running:
        assert sum(details["storage"] > 0 for details in go_on(running, case, LONG[-2:])) == 2


class Gated:
    """Around a store: reads wait until they are let."""

    def __init__(self, store):
        self.open, self.asked = threading.Event(), threading.Event()
        self._store, self.verifies = store, store.verifies

    def get(self, names, into):
        self.asked.set()
        assert self.open.wait(60)
        return self._store.get(names, into)

    def __getattr__(self, name):
        return getattr(self._store, name)


@pytest.fixture
def gates(monkeypatch):
    """Every store that is opened, with its reads behind a gate."""
    made = []

    def opened(backend, extra, identity):
        made.append(Gated(open_store(backend, extra, identity)))
        return made[-1]

    open_store = storage.open_store
    monkeypatch.setattr(storage, "open_store", opened)
    yield made
    for gate in made:
        gate.open.set()


def test_best_effort_waits_for_nothing_and_keeps_what_comes_later(case_of, pages, gates):
    case, folder = case_of("qwen2-4kv")
    with engine(folder, pages) as running:
        begin(running, case, [15])
    with engine(folder, pages, hicache_storage_prefetch_policy="best_effort") as running:
        assert go_on(running, case, [15])[0]["storage"] == 0
        gates[-1].open.set()
        settle(running)
        check_idle(running)


def test_a_request_waits_no_longer_than_its_time(case_of, pages, gates):
    case, folder = case_of("qwen2-4kv")
    with engine(folder, pages) as running:
        begin(running, case, [15])
    short = {**pages, "prefetch_timeout_base": 0.05}
    with engine(folder, short, hicache_storage_prefetch_policy="timeout") as running:
        began = time.monotonic()
        assert go_on(running, case, [15])[0]["storage"] == 0
        assert time.monotonic() - began >= 0.05
        assert gates[-1].asked.is_set()
        gates[-1].open.set()
        settle(running)
        check_idle(running)


def test_others_run_while_a_request_waits_for_the_store_and_its_abort_leaves_nothing(case_of, pages, gates):
    case, folder = case_of("qwen2-4kv")
    with engine(folder, pages) as running:
        begin(running, case, [15])
    with engine(folder, pages) as running:
        waits = threading.Thread(
            target=lambda: running.generate(
                input_ids=case.prompts[15], sampling_params={"max_new_tokens": 4}, rid="waits"
            )
        )
        waits.start()
        assert gates[-1].asked.wait(60)
        assert len(ask(running, [5, 6, 7], 8)["output_ids"]) == 8
        assert running.abort_request("waits") == 1
        waits.join(60)
        assert running._parts.prefetcher.waiting == 0
        gates[-1].open.set()
        settle(running)
        assert go_on(running, case, [15])[0]["host"] > 0  # what came for it was kept
        check_idle(running)


def test_what_comes_slower_than_it_is_computed_is_computed(case_of, pages):
    case, folder = case_of("qwen2-4kv")
    with engine(folder, pages) as running:
        begin(running, case, [15])
        running.flush_cache()
        meter = running._loop.machine.recorder.meter
        meter.rates = lambda stats, now: Rates(1e6, TierRate(1e9, 0, now), TierRate(1.0, 0, now))
        prompt = case.prompts[15] + case.tokens[15][:HALF]
        answer = ask(running, prompt, HALF)
        assert answer["output_ids"] == case.tokens[15][HALF:]
        assert answer["meta_info"]["cached_tokens"] == 0
        (decision,) = answer["meta_info"]["load_decisions"]
        assert not decision["load"]
        assert decision["tier"] == "storage"
        assert decision["load_seconds"] > decision["compute_seconds"] > 0
        check_idle(running)


def test_a_store_that_does_not_return_is_not_let_go_of_before_it_does(case_of, pages, gates):
    case, folder = case_of("qwen2-4kv")
    with engine(folder, pages) as running:
        begin(running, case, [15])
        running.flush_cache()
        answers = []
        waits = threading.Thread(target=lambda: answers.extend(go_on(running, case, [15])))
        waits.start()
        assert gates[-1].asked.wait(60)
        with pytest.raises(EngineError, match="did not return"):
            running.detach_storage(timeout=0.05)
        waits.join(60)  # it did not wait any longer: it computed
        assert answers[0]["storage"] == 0
        with pytest.raises(EngineError, match="did not return"):
            running.detach_storage(timeout=0.05)
        gates[-1].open.set()
        assert running.detach_storage()
        check_idle(running)


def test_a_store_that_was_cleared_has_nothing_and_what_was_promised_is_computed(case_of, pages):
    case, folder = case_of("qwen2-4kv")
    with engine(folder) as running:
        assert running.storage.clear() is None
        running.attach_storage("file", pages)
        begin(running, case)
        evict(running, Tier.DEVICE, Tier.HOST)
        assert running.storage.clear() > 8
        assert all(details["storage"] == 0 for details in go_on(running, case))
        check_idle(running)


def test_settings_of_a_store_are_checked_before_it_is_opened(case_of, tmp_path):
    _, folder = case_of("qwen2-4kv")
    with pytest.raises(ConfigError, match="needs enable_hierarchical_cache"):
        rootcellar.Engine(model_path=folder, skip_tokenizer_init=True, hicache_storage_backend="file")
    with pytest.raises(ConfigError, match="name the folder"):
        engine(folder, hicache_storage_backend="file")
    with engine(folder) as running:
        for backend, extra, said in [
            ("disk", {"path": "x"}, "file"),
            ("file", "{", "json"),
            ("file", "[]", "object"),
            ("file", "@/no/such/file.toml", "cannot be read"),
            ("file", {"path": "x", "prefetch_threshold": "many"}, "prefetch_threshold"),
            ("file", {"path": "x", "colour": 1}, "colour"),
        ]:
            with pytest.raises(ConfigError, match=said):
                running.attach_storage(backend, extra)
        with pytest.raises(ConfigError, match="best_effort"):
            running.attach_storage("file", {"path": str(tmp_path)}, prefetch_policy="never")
        file = tmp_path / "store.toml"
        file.write_text(f'path = "{tmp_path / "pages"}"\nmin_free_space = 0\nmax_size = "16MiB"\n')
        assert running.attach_storage("file", f"@{file}")["hicache_storage_backend_extra_config"]["max_size"] == "16MiB"
        with engine(folder) as second, pytest.raises(ConfigError, match="writ"):
            second.attach_storage("file", f"@{file}")


@pytest.mark.parametrize("value", [{1, 2}, [threading.Lock()], b"bytes"], ids=["set", "list", "bytes"])
def test_settings_that_ranks_cannot_tell_each_other_are_refused(value):
    """They would end the engine where they were to be told."""
    config = SimpleNamespace(node_rank=1, nnodes=2, hicache_storage_prefetch_policy="timeout")
    ranked = storage.StorageBackend(None, SimpleNamespace(config=config, mover=object()))
    with pytest.raises(ConfigError, match=f"mine, a {type(value).__name__}, is not allowed with nnodes"):
        ranked.attach("dynamic", {"class_name": "Store", "mine": value})


def test_the_store_of_an_engine_is_guarded(case_of, pages):
    _, folder = case_of("qwen2-4kv")
    with engine(folder, pages) as running:
        assert running.stats()["copies"]["store"].keys() == {"has", "get", "put"}
        assert running.stats()["copies"]["breaker"] == {"left_alone": 0, "used_again": 0, "away": False}


def test_what_a_request_asked_to_be_durable_is_there_for_whoever_depends_on_it(case_of, pages):
    case, folder = case_of("qwen2-4kv")
    prompt = case.prompts[15]
    with engine(folder, pages, hicache_write_policy="write_back") as running:
        first = running.generate(
            input_ids=prompt,
            sampling_params={"temperature": 0, "max_new_tokens": HALF, "ignore_eos": True},
            storage_checkpoint=True,
        )
        handle = first["meta_info"]["storage_checkpoint"]
        assert handle in running.prefixes.names(prompt + first["output_ids"])
        assert depending(running, prompt + first["output_ids"], handle) == "stored"
        assert depending(running, prompt + first["output_ids"], "0" * 64) == "recomputed"
        check_idle(running)
    with engine(folder, pages, hicache_storage_prefetch_policy="best_effort") as running:  # somebody else
        assert depending(running, prompt + first["output_ids"], handle) == "stored"
        running.storage.clear()
        running.flush_cache()
        assert depending(running, prompt + first["output_ids"], handle) == "recomputed"
        running.detach_storage()
        assert depending(running, prompt + first["output_ids"], handle) == "recomputed"
        for wrong in ({"storage_checkpoint": 1}, {"storage_checkpoint_dependency": "x"}):
            with pytest.raises(RequestError, match="storage_checkpoint"):
                running.generate(input_ids=prompt, **wrong)
    with (
        engine(folder, enable_hierarchical_cache=False) as running,
        pytest.raises(RequestError, match="enable_hierarchical_cache"),
    ):
        running.generate(input_ids=prompt, storage_checkpoint=True)


def depending(engine, prompt, handle):
    answer = engine.generate(
        input_ids=prompt, sampling_params={"max_new_tokens": 1}, storage_checkpoint_dependency=handle
    )
    return answer["meta_info"]["storage_checkpoint_dependency"]


FAULTS = [
    pytest.param("gemma3", 1),
    pytest.param("qwen3-next", 2),
    *(pytest.param(name, seed, marks=pytest.mark.long) for name in FAMILIES for seed in range(3, 7)),
]


@pytest.mark.parametrize(("name", "seed"), FAULTS)
def test_whatever_a_store_does_no_token_is_wrong_and_nothing_is_left_behind(case_of, pages, monkeypatch, name, seed):
    case, folder = case_of(name)
    faults = Faults(delay=0.2, fail=0.08, short=0.15, flip=0.1, lie=0.3)
    made = []

    def opened(extra, identity):
        made.append(FaultyStore(FileStore(read_settings(extra, identity)), faults, seed))
        return made[-1]

    monkeypatch.setitem(registry.BACKENDS, "faulty", opened)
    with engine(folder, hicache_ratio=4.0 if seed % 2 else 0.5) as running:
        running.attach_storage("faulty", pages)
        for _ in range(6):
            begin(running, case)
            running.flush_cache()
            go_on(running, case)
            check_idle(running)
        copies = running.stats()["copies"]
        assert copies["host-storage"]["pages"] > 0
        assert copies["storage-host"]["failed_pages"] + copies["host-storage"]["failed_pages"] > 0
        assert not any(copies[lane]["queued_bytes"] for lane in ("host-storage", "storage-host"))
        assert running._parts.prefetcher.waiting == 0
        assert all(made[0].seen.values())


def test_a_store_that_hangs_stops_neither_a_flush_nor_its_own_detaching(case_of, pages, gates, monkeypatch):
    monkeypatch.setattr(mover, "STALLED", 0.2)
    case, folder = case_of("qwen2-4kv")
    short = {**pages, "prefetch_timeout_base": 0.05}
    with engine(folder, short, hicache_storage_prefetch_policy="timeout") as running:
        begin(running, case, [15])
        running.flush_cache()
        assert go_on(running, case, [15])[0]["storage"] == 0
        assert gates[-1].asked.is_set()
        with pytest.raises(CacheBusy, match="1 copies"):
            running.flush_cache()
        monkeypatch.setattr(mover, "STALLED", 60.0)
        with ThreadPoolExecutor() as pool:
            flushing = pool.submit(running.flush_cache)
            with pytest.raises(EngineError, match="did not return"):
                running.detach_storage(timeout=0.05)  # the engine's thread waits for the store: it no longer does
            with pytest.raises(CacheBusy, match="1 copies"):
                flushing.result(30)
        assert len(ask(running, [5, 6, 7], 8)["output_ids"]) == 8
        gates[-1].open.set()
        assert running.detach_storage()
        check_idle(running)


def test_what_comes_while_copies_are_waited_for_lets_go_of_whoever_waits_for_it(case_of, pages, gates):
    case, folder = case_of("qwen2-4kv")
    with engine(folder, pages) as running:
        begin(running, case, [15])
        running.flush_cache()
        running.pause_generation("in_place")
        with ThreadPoolExecutor() as pool:
            waits = pool.submit(go_on, running, case, [15])
            assert gates[-1].asked.wait(60)
            flushing = pool.submit(running.flush_cache)
            gates[-1].open.set()
            flushing.result(60)
            running.continue_generation()
            assert waits.result(60)[0]["device"] == 0
        check_idle(running)


def test_an_engine_that_nobody_refers_to_lets_go_of_its_store(case_of, pages):
    _, folder = case_of("qwen2-4kv")
    running = engine(folder, pages)
    del running
    gc.collect()
    with engine(folder, pages):
        pass
