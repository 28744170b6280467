"""SGLang's Python ``RadixCache`` and allocators, run on a trace's first requests: a peer for ``cache_core.py``.

    python benchmarks/peer_sglang.py WHEEL_FOLDER TRACE PAGE_SIZE REQUESTS CAPACITY

``WHEEL_FOLDER`` is an unpacked wheel (``pip download --no-deps sglang==0.5.23``, then unzip); the interpreter needs
torch only. Of SGLang just the cache's own modules are loaded; what else they import (kernels, servers, metrics) is
replaced by objects that do nothing, which can only make the peer faster. Prints one JSON object.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import json
import sys
import time
import types
from array import array

REAL = ("radix_cache", "base_prefix_cache", "evict_policy", "cache_init_params", "allocation_sizing")


class Nothing:
    """Does nothing, is false, and has every attribute."""

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *_args, **_options):
        return self

    def __bool__(self) -> bool:
        return False


NOTHING = Nothing()


class Stub(types.ModuleType):
    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return STANDINS.get(name, NOTHING)


class Recorder(Nothing):
    def __init__(self, **_options) -> None: ...


def get_num_new_pages(seq_lens, page_size, prefix_lens=None, decode=False):
    after = (seq_lens + page_size - 1) // page_size
    before = (seq_lens - 1 + page_size - 1) // page_size if decode else (prefix_lens + page_size - 1) // page_size
    return int((after - before).sum().item())


STANDINS = {
    "KVCacheEventRecorder": Recorder,
    "KvEventLoraNames": Recorder,
    "LoRANameTable": Recorder,
    "get_num_new_pages": get_num_new_pages,
    "ceil_align": lambda value, step: -(-value // step) * step,
    "is_hip": lambda: False,
    "get_bool_env_var": lambda *_: False,
}


class Stubs(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Stands in for every module of SGLang but the cache's own, and for triton."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def find_spec(self, name, *_):
        parts = name.split(".")
        if parts[0] not in ("sglang", "triton"):
            return None
        own = parts[:3] == ["sglang", "srt", "mem_cache"] and len(parts) > 3
        if own and (parts[3] in REAL or parts[3:] in (["utils"], ["allocator"]) or parts[3] == "allocator"):
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        module = Stub(spec.name)
        module.__path__ = [f"{self.folder}/{spec.name.replace('.', '/')}"]
        return module

    def exec_module(self, module) -> None: ...


def load(folder: str):
    sys.meta_path.insert(0, Stubs(folder))
    import torch

    def module(name: str):
        return importlib.import_module(f"sglang.srt.mem_cache.{name}")

    return torch, module


def prompts(trace: str, count: int) -> list[array]:
    found = []
    with open(trace, encoding="utf-8") as lines:
        for line in lines:
            if len(found) == count:
                break
            request = json.loads(line)
            tokens = array("q")
            for ident in request["hash_ids"]:
                tokens.extend(range(ident * 512, ident * 512 + 512))
            found.append(tokens[: request["input_length"]])
    return found


def main(folder: str, trace: str, page_size: int, count: int, capacity: int) -> None:
    torch, module = load(folder)
    base, radix = module("base_prefix_cache"), module("radix_cache")
    torch.set_num_threads(1)
    if page_size == 1:
        pool = module("allocator.token").TokenToKVPoolAllocator(capacity, torch.float16, "cpu", None, False)
    else:
        paged = module("allocator.paged").PagedTokenToKVPoolAllocator
        pool = paged(capacity, page_size, torch.float16, "cpu", None, False)
    params = module("cache_init_params").CacheInitParams
    cache = radix.RadixCache(
        params(disable=False, req_to_token_pool=None, token_to_kv_pool_allocator=pool, page_size=page_size)
    )
    keys = prompts(trace, count)
    hit = asked = 0
    begin = time.perf_counter()
    for tokens in keys:
        key = radix.RadixKey(tokens, None)
        found = cache.match_prefix(base.MatchPrefixParams(key=key))
        node = found.last_device_node
        known = found.device_prefix_len
        held = cache.path_device_indices(node)
        cache.inc_lock_ref(node)
        hit += known
        asked += len(tokens)
        need = len(tokens) - known
        room = pool.available_size()
        if room < need + page_size:
            cache.evict(base.EvictParams(num_tokens=need + page_size - room))
        if page_size == 1:
            new = pool.alloc(need)
        else:
            before, after = torch.tensor([known]), torch.tensor([len(tokens)])
            last = held[-1:] if known else torch.tensor([-1])
            new = pool.alloc_extend(before, before, after, after, last, need) if need else held[:0]
        assert new is not None, "the pool is full"
        slots = torch.cat([held, new])
        whole = len(tokens) // page_size * page_size
        result = cache.insert(base.InsertParams(key=key.page_aligned(page_size), value=slots[:whole].clone()))
        if result.prefix_len > known:
            pool.free(slots[known : result.prefix_len])
        if whole < len(tokens):
            pool.free(slots[max(whole, known) :])
        cache.dec_lock_ref(node)
    seconds = time.perf_counter() - begin
    print(json.dumps({"requests_per_second": count / seconds, "hit_rate": hit / asked, "page_size": page_size}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:6]))
