"""What a machine with a GPU or a TPU must show (`make test-device`): a line a check; status 1 if one fails.

    python scripts/device_check.py [--anywhere] [--quick]

``--anywhere``: on a CPU too, to try the script itself. ``--quick``: one family, one small pool.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from checkpoints import golden, make_checkpoint  # noqa: I001

import rootcellar
from rootcellar.ops.backends import BACKENDS, Reach, attention, choose_backend, preferred
from rootcellar.plan.stored import Heads, Latents, Stored
from rootcellar.pools import Layout, Pool
from rootcellar.pools.copying import BLOCKS, copier
from rootcellar.pools.layouts import layout_of, page_bytes

GOLDEN = ("qwen2-4kv", "llama3-d128", "gemma3", "gpt-oss", "deepseek3", "bamba")
STORED: dict[str, tuple[Stored, int, int]] = {
    # What is stored, query heads, elements of a query.
    "8 KV heads of 128": (Heads(8, 128, 4), 32, 128),
    "8 KV heads of 64": (Heads(8, 64, 8), 64, 64),
    "latents of 576": (Latents(512, 64), 16, 576),
}
PAGE = 16
Line = tuple[bool, str]


def check_golden(name: str, backend: str) -> Iterator[Line]:
    """Tokens as transformers gave them, by one attention backend; donation and compilations of the same engine."""
    case = golden(name)
    with tempfile.TemporaryDirectory() as folder:
        made = make_checkpoint(case.family, folder, seed=case.seed, **case.overrides)
        options = {"model_path": str(made), "skip_tokenizer_init": True, "dtype": "float32", "max_total_tokens": 8192}
        with rootcellar.Engine(**options, max_running_requests=16, attention_backend=backend) as engine:
            sampling = [{"temperature": 0, "max_new_tokens": len(each), "ignore_eos": True} for each in case.tokens]

            def answers() -> list[list[int]]:
                return [out["output_ids"] for out in engine.generate(input_ids=case.prompts, sampling_params=sampling)]

            found = answers()
            wrong = [i for i, (ours, theirs) in enumerate(zip(found, case.tokens, strict=True)) if ours != theirs]
            yield (
                not wrong,
                f"golden tokens of {name}, {backend}: {len(found) - len(wrong)} of {len(found)} answers"
                + (f"; the first that differs is answer {wrong[0]}" if wrong else ""),
            )
            machine = engine._loop.machine
            places = {
                b.unsafe_buffer_pointer() for p in machine.runner.pools.values() for b in jax.tree.leaves(p.buffers)
            }
            compiled = engine.stats()["compilations"]
            again = answers()
            after = {
                b.unsafe_buffer_pointer() for p in machine.runner.pools.values() for b in jax.tree.leaves(p.buffers)
            }
            yield again == found, f"the same tokens from the cache: {name}"
            yield (
                after == places,
                f"pools are the same memory after steps: {len(after & places)} of {len(places)} buffers",
            )
            more = engine.stats()["compilations"] - compiled
            yield more <= 2, f"compilations of what was asked a second time: {more} (hits have steps of their own)"


def check_sizing() -> Iterator[Line]:
    """A cache as large as the device takes, by ``memory_stats``."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" not in stats:
        yield True, "memory sizing: the device keeps no statistics"
        return
    with rootcellar.Engine(model_path="demo", max_running_requests=64) as engine:
        taken, limit = engine.stats()["kv_cache_bytes"], stats["bytes_limit"]
        used = (jax.local_devices()[0].memory_stats() or {})["bytes_in_use"]
        yield used <= limit, f"memory sizing: KV cache {taken:,} bytes, in use {used:,} of {limit:,}"


def seconds(run: Callable[[], object], times: int = 10) -> float:
    """The median of so many runs, after one that compiles."""
    jax.block_until_ready(run())
    took = []
    for _ in range(times):
        began = time.perf_counter()
        jax.block_until_ready(run())
        took.append(time.perf_counter() - began)
    return median(took)


def copy_bandwidth(nbytes: int) -> float:
    """Bytes a second that the device reads and writes while it copies."""
    array, copy = jnp.zeros(nbytes // 4, jnp.float32), jax.jit(lambda a: a + 1)
    return 2 * nbytes / seconds(lambda: copy(array))


def backends_over(usual: Layout) -> list[str]:
    """The backends that can attend here, the one that is taken first."""
    platform = jax.default_backend()
    able = [name for name, each in BACKENDS.items() if each.lacks(preferred(name, usual, platform), platform) is None]
    first = choose_backend("auto", [usual], platform)
    return [first, *(name for name in able if name != first)]


def check_bandwidth(name: str, batch: int, context: int, copied: float) -> Iterator[Line]:
    """Decode attention of each backend: bytes of the KV that it must read, a second."""
    usual = layout_of(STORED[name][0], "bfloat16", PAGE)
    for i, backend in enumerate(backends_over(usual)):
        yield from check_backend(backend, name, batch, context, copied, host_copies=not i and context >= 8192)


def check_backend(
    backend: str, name: str, batch: int, context: int, copied: float, *, host_copies: bool
) -> Iterator[Line]:
    """See :func:`check_bandwidth`; ``host_copies``: and of its pool :func:`check_host_copies`."""
    stored, heads, dim = STORED[name]
    usual = layout_of(stored, "bfloat16", PAGE)
    layout = preferred(backend, usual, jax.default_backend())
    width = context // PAGE
    pool = Pool(layout, 1, batch * width)
    tables = jnp.arange(1, batch * width + 1, dtype=jnp.int32).reshape(batch, width)
    where = tables, jnp.arange(batch, dtype=jnp.int32), jnp.full(batch, context - 1, jnp.int32)
    q = jnp.ones((batch, heads, dim), jnp.bfloat16)
    new = jnp.ones((batch, *((stored.kv_heads, dim) if isinstance(stored, Heads) else (dim,))), jnp.bfloat16)
    parts = (new, new, jnp.full(heads, -jnp.inf)) if isinstance(stored, Heads) else (new,)
    step = jax.jit(attention(backend, layout, Reach(scale=dim**-0.5)), donate_argnums=len(parts) + 4)

    def run() -> object:
        out, *buffers = step(q, *parts, *where, *pool.buffers[0])
        pool.buffers = [tuple(buffers)]
        return out

    rate = batch * width * page_bytes(usual) / seconds(run)
    share = rate / copied
    yield (
        True,
        f"decode over {name}, {batch} x {context}, {backend}: {rate / 1e9:,.1f} GB/s, {share:.0%} of a device copy",
    )
    if host_copies:
        yield from check_host_copies(pool)
    pool.free()


def check_host_copies(pool: Pool) -> Iterator[Line]:
    """Pages to the host and back."""
    copies, count = copier(pool), BLOCKS[-1]
    pages, rows = np.arange(1, count + 1, dtype=np.int32), np.arange(count)
    images = np.zeros((count, copies.image.nbytes), np.uint8)

    def write() -> object:
        copies.write(pages, copies.fetch(images, rows))()
        return pool.buffers

    def read() -> None:
        copies.read(pages, images, rows)()

    for way, run in {"to the host": read, "from the host": write}.items():
        yield (
            True,
            f"{count} pages of {copies.image.nbytes:,} bytes {way}: {images.nbytes / seconds(run) / 1e9:,.2f} GB/s",
        )


def checks(quick: bool) -> Iterator[Line]:
    """All, in the order of what they tell."""
    for name in GOLDEN[:1] if quick else GOLDEN:
        for backend in ("auto", "gpu") if jax.default_backend() == "gpu" else ("auto",):
            yield from check_golden(name, backend)
    yield from check_sizing()
    copied = copy_bandwidth(2**24 if quick else 2**30)
    yield True, f"a device copy: {copied / 1e9:,.1f} GB/s read and written"
    for name in STORED:
        for batch, context in ((4, 1024),) if quick else ((1, 8192), (16, 2048), (64, 2048), (64, 8192)):
            yield from check_bandwidth(name, batch, context, copied)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--anywhere", action="store_true")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    device = jax.local_devices()[0]
    if device.platform == "cpu" and not args.anywhere:
        print('skipped: JAX finds no GPU and no TPU here (install "jax[cuda12]" or "jax[tpu]" into the environment)')
        return
    jax.config.update("jax_default_matmul_precision", "highest")  # golden tokens are those of float32
    print(f"{device.device_kind}, jax {jax.__version__}")
    failed = 0
    for held, line in checks(args.quick):
        failed += not held
        print(f"{'  ' if held else '! '}{line}", flush=True)
    print("all held" if not failed else f"{failed} did not hold")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
