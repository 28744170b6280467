"""The kernels for TPUs and GPUs, interpreted, against attention written out: every kind of layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_attention import make_case, reference

from rootcellar.errors import ConfigError
from rootcellar.ops.backends import Reach, choose_backend, gpu, preferred, tpu
from rootcellar.ops.paged_gpu import cut
from rootcellar.plan.stored import Heads, Latents
from rootcellar.pools.layouts import PagedHeads, PairedHeads, layout_of

CASES = {
    # Lengths, of which so many are new, in tiles of so many; KV heads, query heads of each, size; what is seen.
    "decode": ([700, 1, 37, 64], [1, 1, 1, 1], 1, (2, 3, 64, "float32"), Reach(scale=0.125)),
    "prefill": ([90, 33, 260], [90, 5, 100], 16, (1, 4, 128, "float32"), Reach(scale=0.09)),
    "window": ([700, 37, 600], [1, 1, 1], 1, (2, 2, 64, "float32"), Reach("sliding_window", 130, 0.125)),
    "window-prefill": ([300, 64], [100, 64], 16, (1, 2, 64, "float32"), Reach("sliding_window", 20, 0.125)),
    "chunk": ([700, 37], [1, 1], 1, (1, 5, 128, "float32"), Reach("chunked_local", 256, 0.1)),
    "chunk-prefill": ([300, 65], [100, 65], 16, (2, 2, 64, "float32"), Reach("chunked_local", 24, 0.125)),
    "capped": ([300, 64], [20, 1], 16, (1, 2, 64, "float32"), Reach("sliding_window", 100, 0.5, 3.0)),
    "bfloat16": ([300, 64], [1, 1], 1, (1, 8, 128, "bfloat16"), Reach(scale=0.09)),
}


KERNELS = {
    # The file, its layout of heads, and a pool as CPUs have it in that layout.
    "tpu": (
        tpu,
        PairedHeads,
        lambda pool: pool.transpose(0, 2, 3, 1, 4).reshape(*pool.shape[:1], *pool.shape[2:4], -1),
    ),
    "gpu": (gpu, PagedHeads, lambda pool: pool),
}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("case", CASES)
def test_each_kind_matches_reference(kernel, case):
    sinks = case in ("window-prefill", "decode", "bfloat16")
    lengths, new, tile, (kv_heads, group, head_dim, dtype), reach = CASES[case]
    rng = np.random.default_rng(7)
    pool, batch, keys, values, source = make_case(
        rng, lengths=lengths, new=new, tile=tile, page_size=16, kv_heads=kv_heads, group=group, head_dim=head_dim,
        dtype=dtype, reach=reach,
    )  # fmt: skip
    backend, heads, laid = KERNELS[kernel]
    layout = heads(kv_heads, head_dim, jnp.dtype(dtype), 16)
    assert backend.unfit(layout) is None
    q, k, v, *where = batch
    sink = rng.normal(0, 2, kv_heads * group).astype(np.float32) if sinks else np.full(kv_heads * group, -np.inf)
    attend = jax.jit(backend.attend(layout, reach, interpret=True))
    out, pool = attend(q, k, v, jnp.asarray(sink, jnp.float32), *where, jnp.asarray(laid(pool), dtype))
    off = {"atol": 3e-6, "rtol": 3e-5} if dtype == "float32" else {"atol": 0.02, "rtol": 0.02}
    for i, s in enumerate(source):
        if s is not None:
            expected = reference(np.asarray(q[i]), keys[s[0]], values[s[0]], s[1], reach, sink if sinks else None)
            np.testing.assert_allclose(out[i], expected, **off)


@pytest.mark.parametrize("kernel", KERNELS)
def test_latents_match_reference(kernel, monkeypatch):
    """Keys that are their own values, shared by all heads, which are cut into two parts."""
    monkeypatch.setattr(tpu, "_MOST_QUERIES", 32)
    rng = np.random.default_rng(3)
    dim, heads, length, page = 48, 4, 70, 8  # two powers of two
    backend = KERNELS[kernel][0]
    layout = backend.prefers(layout_of(Latents(32, 16), "float32", page), kernel)
    assert backend.unfit(layout) is None
    width = layout.buffers(1)[0].shape[-1]
    held = rng.standard_normal((length, dim)).astype(np.float32)
    table = rng.permutation(np.arange(1, 20))[:12]
    pool = np.full((20, page, width), np.nan, np.float32)
    for t in range(length - 16):
        pool[table[t // page], t % page] = np.pad(held[t], (0, width - dim))
    q = rng.standard_normal((16, heads, dim)).astype(np.float32)
    reach = Reach(scale=0.2)
    where = (
        jnp.asarray(table[None], jnp.int32),
        jnp.zeros(1, jnp.int32),
        jnp.arange(length - 16, length, dtype=jnp.int32),
    )
    out, pool = jax.jit(backend.attend(layout, reach, interpret=True))(q, held[-16:], *where, pool)
    for i in range(16):
        expected = reference(q[i], held[:, None], held[:, None], length - 16 + i, reach)
        np.testing.assert_allclose(out[i], expected, atol=3e-6, rtol=3e-5)
    np.testing.assert_array_equal(
        np.asarray(pool)[table[length // page], : length % page, :dim], held[length // page * page :]
    )


def test_rows_for_gpus_are_read_in_powers_of_two():
    for width in range(16, 640, 16):
        parts = cut(width)
        assert [start for start, _ in parts] == [0, *np.cumsum([size for _, size in parts])[:-1]]
        assert sum(size for _, size in parts) == width
        assert all(size >= 16 and size & (size - 1) == 0 for _, size in parts)


def test_the_kernel_for_gpus_is_taken_by_its_name():
    def lacks(stored, dtype="bfloat16"):
        return gpu.unfit(layout_of(stored, dtype, 16)) or "nothing"

    assert lacks(Heads(8, 96)) == lacks(Latents(512, 64), "float16") == lacks(Heads(2, 80), "float32") == "nothing"
    assert "heads of 72 elements" in lacks(Heads(2, 72))
    assert "'heads' and 'latents'" in lacks(Heads(2, 64), "int8")
    assert choose_backend("gpu", [layout_of(Heads(8, 128), "bfloat16", 1)], "gpu") == "gpu"
    with pytest.raises(ConfigError, match="it runs on GPUs, and the device is a tpu"):
        choose_backend("gpu", [layout_of(Heads(8, 128), "bfloat16", 16)], "tpu")


def test_what_it_reads_is_what_is_seen():
    """Pages of a window are those that the window touches; padding reads nothing."""
    layout = PairedHeads(2, 64, jnp.dtype(jnp.bfloat16), 16)
    page = 2 * 16 * 128 * 2
    last = np.array([0, 15, 16, 999, -1])
    assert tpu.read_bytes(layout, Reach(), last, last) == (1 + 1 + 2 + 63) * page
    assert tpu.read_bytes(layout, Reach("sliding_window", 17), last, last) == (1 + 1 + 2 + 2) * page
    assert tpu.read_bytes(layout, Reach("chunked_local", 32), last, last) == (1 + 1 + 2 + 1) * page


def test_it_is_taken_on_tpus_where_pages_are_whole_tiles():
    def chosen(stored, dtype="bfloat16", page=16, platform="tpu"):
        return choose_backend("auto", [layout_of(stored, dtype, page)], platform)

    assert chosen(Heads(8, 128)) == chosen(Heads(8, 64)) == chosen(Latents(512, 64)) == "tpu"
    assert chosen(Heads(8, 128), page=1) == chosen(Heads(8, 80)) == chosen(Heads(8, 128), "int8") == "xla"
    assert chosen(Heads(8, 128), platform="gpu") == "xla"
    with pytest.raises(ConfigError, match="'tpu' cannot be used: it runs on TPUs, and the device is a cpu"):
        choose_backend("tpu", [layout_of(Heads(8, 128), "bfloat16", 16)], "cpu")
    heads = layout_of(Heads(2, 64), "float32", 8)
    assert preferred("xla", heads, "cpu") == heads
    assert preferred("xla", heads, "tpu") == preferred("tpu", heads, "tpu") == PairedHeads(2, 64, heads.dtype, 8)
