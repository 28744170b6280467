"""The attention kernel at the sizes of each family, compiled for an H100 that is not here (``make test-gpu-compile``).

JAX brings the kernel to Triton's language; Triton, from PyPI, makes a program of it, and its assembler says what that
takes. A table of what was found is printed at the end.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import pytest
from jax._src.interpreters import mlir
from jax._src.lib import triton as dialect
from jax._src.lib.mlir import ir

from rootcellar.ops.backends import Reach, gpu
from rootcellar.ops.paged_gpu import NAME
from rootcellar.plan.stored import Heads, Latents
from rootcellar.pools.layouts import layout_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="triton is not installed: make test-gpu-compile"
    ),
]

CHIP = 90
"""Compute capability of H100 and H200."""
SHARED = 227 * 1024
"""Bytes of shared memory that a program may have there."""
SPILLED = 64
"""Bytes of a thread that may not fit into its registers: a few, outside of the loop."""


@dataclass(frozen=True)
class Layer:
    """What is stored of a token, query heads, what they see, and the page size."""

    stored: Heads | Latents
    heads: int
    reach: Reach
    page_size: int = 16
    dtype: str = "bfloat16"


LAYERS = {
    "Qwen2.5-3B": Layer(Heads(2, 128), 16, Reach(scale=0.1)),
    "Llama 3 8B": Layer(Heads(8, 128), 32, Reach(scale=0.1), page_size=1),
    "Gemma 3 27B, window": Layer(Heads(16, 128), 32, Reach("sliding_window", 1024, 0.1)),
    "Gemma 2 2B": Layer(Heads(4, 256), 8, Reach("sliding_window", 4096, 0.1, 50.0)),
    "gpt-oss-120b, window": Layer(Heads(8, 64), 64, Reach("sliding_window", 128, 0.1)),
    "Llama 4 Scout, chunk": Layer(Heads(8, 128), 40, Reach("chunked_local", 8192, 0.1)),
    "Phi 3 mini": Layer(Heads(32, 96), 32, Reach(scale=0.1)),
    "Qwen3-Next": Layer(Heads(2, 256), 16, Reach(scale=0.1)),
    "DeepSeek V3": Layer(Latents(512, 64), 128, Reach(scale=0.1)),
    "float32": Layer(Heads(8, 64), 32, Reach(scale=0.1), dtype="float32"),
}
TABLE: list[str] = []


@pytest.fixture(scope="module", autouse=True)
def table():
    """What was seen, for docs/accelerators.md."""
    yield
    head = "| attention of | step | programs | registers | shared memory |"
    print("", head, "|---|---|---|---|---|", *TABLE, sep="\n")


@pytest.mark.parametrize("tile", [1, 16])
@pytest.mark.parametrize("name", LAYERS)
def test_it_compiles_and_fits_its_registers(name, tile, tmp_path):
    import triton
    from triton.backends.compiler import GPUTarget

    call = lowered(LAYERS[name], tiles=64 if tile == 1 else 32, tile=tile)
    with context() as known:
        source = ir.Module.parse(call["ir"].value_bytes, known).operation.get_asm()
    file = tmp_path / "kernel.ttir"
    file.write_text(source)
    options = {each: call[each].value for each in ("num_warps", "num_stages")}
    made = triton.compile(str(file), target=GPUTarget("cuda", CHIP, 32), options=options)
    registers, spilled = assembled(made.asm["ptx"], tmp_path)
    grid = call["grid_x"].value, call["grid_y"].value
    step = "decode, 64 rows" if tile == 1 else "prefill, 512 tokens"
    TABLE.append(f"| {name} | {step} | {grid[0]} x {grid[1]} | {registers} | {made.metadata.shared:,} |")
    assert spilled <= SPILLED
    assert made.metadata.shared <= SHARED
    assert ("mma" in made.asm["ptx"]) == (LAYERS[name].dtype != "float32"), "tensor cores, where they are exact"


def lowered(layer, *, tiles, tile):
    """What JAX asks of Triton: the attributes of the one call in a compiled step's attention."""
    layout = layout_of(layer.stored, layer.dtype, layer.page_size)
    tokens, shape = tiles * tile, jax.ShapeDtypeStruct
    if isinstance(layer.stored, Heads):
        kv = shape((tokens, layer.stored.kv_heads, layer.stored.head_dim), layout.dtype)
        width, parts = layer.stored.head_dim, (kv, kv, shape((layer.heads,), jnp.float32))
    else:
        width = layout.dim
        parts = (shape((tokens, width), layout.dtype),)
    where = (shape((256, 8192 // layer.page_size), jnp.int32), shape((tiles,), jnp.int32), shape((tokens,), jnp.int32))
    q = shape((tokens, layer.heads, width), layout.dtype)
    attend = jax.jit(gpu.attend(layout, layer.reach))
    text = attend.trace(q, *parts, *where, *layout.buffers(65536 // layer.page_size))
    (call,) = calls(text.lower(lowering_platforms=("cuda",)).compiler_ir("stablehlo").operation)
    assert call["name"].value == NAME
    return call


def calls(operation):
    for region in operation.regions:
        for block in region.blocks:
            for inner in block.operations:
                named = inner.attributes["call_target_name"].value if "call_target_name" in inner.attributes else ""
                if named.endswith("triton"):
                    yield inner.attributes["mhlo.backend_config"]
                yield from calls(inner.operation)


def context():
    """Triton's language, as JAX's own libraries know it."""
    known = mlir.make_ir_context()
    dialect.dialect.register_dialect(known)
    return known


def assembled(ptx, folder):
    """Registers of a thread, and bytes that did not fit into them, as NVIDIA's assembler says."""
    from triton.backends.nvidia.compiler import get_ptxas

    file = folder / "kernel.ptx"
    file.write_text(ptx)
    words = [get_ptxas(CHIP).path, "-v", f"-arch=sm_{CHIP}a", str(file), "-o", str(folder / "kernel.cubin")]
    said = subprocess.run(words, capture_output=True, text=True, check=True).stderr
    spilled = sum(map(int, re.findall(r"(\d+) bytes spill", said)))
    return int(re.search(r"Used (\d+) registers", said)[1]), spilled
