"""Loads SGLang's cache modules, and nothing else of it, from an installed wheel: torch and NumPy are enough.

What these modules import besides (kernels, servers, metrics) is replaced by objects that do nothing, which can only
make the peer faster. Its Rust core is loaded from the extension in the wheel, without the adapter around it.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from array import array
from functools import cache
from pathlib import Path

import torch

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
    """As SGLang's: how many pages a batch needs, on CPU tensors."""
    if decode:
        return (seq_lens % page_size == 1).int().sum().item()
    pages = (seq_lens + page_size - 1) // page_size - (prefix_lens + page_size - 1) // page_size
    return pages.sum().item()


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

    def __init__(self, folder: Path) -> None:
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
        module.__path__ = [str(self.folder.parent.joinpath(*spec.name.split(".")))]
        return module

    def exec_module(self, module) -> None: ...


@cache
def folder() -> Path:
    """Where the wheel is installed."""
    spec = importlib.util.find_spec("sglang")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("this interpreter has no sglang; install it with: pip install --no-deps sglang==0.5.23")
    return Path(next(iter(spec.submodule_search_locations)))


@cache
def python_module(name: str):
    """A module of ``sglang.srt.mem_cache``."""
    if not any(isinstance(finder, Stubs) for finder in sys.meta_path):
        sys.meta_path.insert(0, Stubs(folder()))
    return importlib.import_module(f"sglang.srt.mem_cache.{name}")


@cache
def rust_module():
    """The Rust core's extension module, as it is."""
    (path,) = (folder() / "srt/mem_cache/rust_tree_core").glob("mem_cache.*.so")
    loader = importlib.machinery.ExtensionFileLoader("mem_cache", str(path))
    module = importlib.util.module_from_spec(importlib.machinery.ModuleSpec("mem_cache", loader, origin=str(path)))
    loader.exec_module(module)
    return module


def allocator(size: int, page_size: int):
    """SGLang's slot allocator, on the CPU."""
    torch.set_num_threads(1)
    if page_size == 1:
        return python_module("allocator.token").TokenToKVPoolAllocator(size, torch.float16, "cpu", None, False)
    paged = python_module("allocator.paged").PagedTokenToKVPoolAllocator
    return paged(size, page_size, torch.float16, "cpu", None, False)


class CountingAllocator:
    """Counts slots and hands out the same ones: what is left when the allocator's own work is taken out."""

    def __init__(self, size: int, page_size: int) -> None:
        self.size = size
        self.page_size = page_size
        self.room = size
        self.device = "cpu"
        self.slots = torch.arange(1 << 18, dtype=torch.int64)

    def available_size(self) -> int:
        return self.room

    def take(self, count: int):
        self.room -= -(-count // self.page_size) * self.page_size
        return self.slots[:count]

    def free_segment(self, values, *, start_pos: int) -> None:
        del start_pos
        self.room += -(-len(values) // self.page_size) * self.page_size


def take(pool, held, known: int, length: int):
    """Slots for the tokens ``[known, length)`` of one request, by the allocator's way for its page size."""
    need = length - known
    if isinstance(pool, CountingAllocator):
        return pool.take(need)
    if need == 0:
        return held[:0]
    if pool.page_size == 1:
        return pool.alloc(need)
    before, after = torch.tensor([known]), torch.tensor([length])
    last = held[-1:] if known else torch.tensor([-1])
    return pool.alloc_extend(before, before, after, after, last, need)


def key_of(tokens: array, page_size: int):
    """SGLang's key, cut to whole pages as its callers do."""
    return python_module("radix_cache").RadixKey(tokens, None).page_aligned(page_size)
