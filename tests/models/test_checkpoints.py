"""Checkpoints of few bits, written element by element as their formats say: what is loaded is what they stand for.

What the formats' own libraries write is in tests/reference/test_published.py.
"""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from checkpoints import make_checkpoint, make_config, make_tensors
from rootcellar.errors import ModelError
from rootcellar.models.config import load_config
from rootcellar.models.loader import check_weights, load_params

SMALL = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "vocab_size": 48, "num_hidden_layers": 1}
E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]


def rng(name):
    return np.random.default_rng(list(name.encode()))


def words(codes, axis, order=range(8)):
    """4-bit integers packed into int32 along ``axis``, the first into the lowest bits, in ``order``."""
    codes = np.moveaxis(codes.astype(np.uint32), axis, -1)
    packed = np.zeros((*codes.shape[:-1], codes.shape[-1] // 8), np.uint32)
    for word in range(packed.shape[-1]):
        for place, which in enumerate(order):
            packed[..., word] |= codes[..., 8 * word + which] << np.uint32(4 * place)
    return np.ascontiguousarray(np.moveaxis(packed, -1, axis)).view(np.int32)


def by_element(shape, value):
    out = np.zeros(shape, np.float32)
    for at in np.ndindex(*shape):
        out[at] = value(*at)
    return out


# Each gives what is stored of a matrix, by the name of its part, and what that stands for.


def fp8(name, shape):
    weight = rng(name).standard_normal(shape).astype(np.float32).astype(ml_dtypes.float8_e4m3fn)
    scale = rng(name + "s").uniform(0.5, 2, (-(-shape[0] // 24), -(-shape[1] // 40))).astype(np.float32)
    wide = weight.astype(np.float32)
    return {name: weight, name + "_scale_inv": scale}, by_element(
        shape, lambda o, i: wide[o, i] * scale[o // 24, i // 40]
    )


def int4(name, shape, groups):
    outputs, _ = shape
    random = rng(name)
    codes, zeros = random.integers(0, 16, shape), random.integers(0, 15, (outputs, groups))
    scales = random.uniform(0.02, 0.1, (outputs, groups)).astype(np.float16)
    return codes, zeros, scales


def awq(name, shape):
    base, (codes, zeros, scales) = name.removesuffix(".weight"), int4(name, shape, 2)
    half, order = shape[1] // 2, (0, 2, 4, 6, 1, 3, 5, 7)
    stored = {"qweight": words(codes.T, 1, order), "qzeros": words(zeros.T, 1, order), "scales": scales.T.copy()}
    value = by_element(shape, lambda o, i: (codes[o, i] - zeros[o, i // half]) * np.float32(scales[o, i // half]))
    return {f"{base}.{part}": array for part, array in stored.items()}, value


def gptq(name, shape):
    base, (codes, zeros, scales) = name.removesuffix(".weight"), int4(name, shape, 4)
    group = rng(name + "g").permutation(np.arange(shape[1]) % 4).astype(np.int32)
    stored = {"qweight": words(codes.T, 0), "qzeros": words(zeros.T, 1), "scales": scales.T.copy(), "g_idx": group}
    value = by_element(shape, lambda o, i: (codes[o, i] - (zeros[o, group[i]] + 1)) * np.float32(scales[o, group[i]]))
    return {f"{base}.{part}": array for part, array in stored.items()}, value


def packed(name, shape):
    codes, zeros, scales = int4(name, shape, 2)
    half = shape[1] // 2
    stored = {"packed": words(codes, 1), "zero_point": words(zeros, 0), "scale": scales.astype(np.float32)}
    stored["shape"] = np.array(shape, np.int64)
    value = by_element(shape, lambda o, i: (codes[o, i] - zeros[o, i // half]) * np.float32(scales[o, i // half]))
    return {f"{name}_{part}": array for part, array in stored.items()}, value


def int8(name, shape):
    codes = rng(name).integers(-127, 128, shape).astype(np.int8)
    scale = rng(name + "s").uniform(0.001, 0.01, (shape[0], 1)).astype(np.float32)
    return {name: codes, name + "_scale": scale}, codes * scale


def mxfp4(name, shape):
    experts, inputs, outputs = shape
    codes = rng(name).integers(0, 16, (experts, outputs, inputs))
    exponents = rng(name + "s").integers(120, 128, (experts, outputs, inputs // 32)).astype(np.uint8)
    stored = (codes[..., 0::2] | codes[..., 1::2] << 4).astype(np.uint8)
    value = by_element(
        shape, lambda e, i, o: np.float32(E2M1[codes[e, o, i]] * 2.0 ** (int(exponents[e, o, i // 32]) - 127))
    )
    return {f"{name}_blocks": stored.reshape(experts, outputs, -1, 16), f"{name}_scales": exponents}, value


FORMATS = {
    "fp8": ({"quant_method": "fp8", "weight_block_size": [24, 40]}, fp8),
    "awq": ({"quant_method": "awq", "bits": 4, "version": "gemm"}, awq),
    "gptq": ({"quant_method": "gptq", "bits": 4, "desc_act": True}, gptq),
    "packed": ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, packed),
    "int8": ({"quant_method": "compressed-tensors", "format": "int-quantized"}, int8),
    "mxfp4": ({"quant_method": "mxfp4"}, mxfp4),
}


def is_coded(name, array, method):
    if method == "mxfp4":
        return name.endswith(("gate_up_proj", "down_proj"))
    return name.endswith("proj.weight")


def write(folder, method):
    """A checkpoint of a format, in ``folder``; returns its float twin's folder."""
    described, code = FORMATS[method]
    family, small = (
        ("gpt-oss", {**SMALL, "layer_types": ["full_attention"]}) if method == "mxfp4" else ("llama2", SMALL)
    )
    twin = make_checkpoint(family, folder / "floats", **small)
    stored, floats = {}, {}
    for name, array in make_tensors(make_config(family, **small), 0).items():
        parts, value = code(name, array.shape) if is_coded(name, array, method) else ({name: array}, array)
        stored |= parts
        floats[name] = value
    save_file(floats, twin / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((twin / "config.json").read_text()) | {"quantization_config": described}
    (folder / "config.json").write_text(json.dumps(config))
    save_all(stored, folder / "model.safetensors")
    return twin


def save_all(tensors, path):
    """Safetensors with types that the library does not take from numpy."""
    header, at, data = {}, 0, b""
    for name, array in tensors.items():
        known = {"float8_e4m3fn": "F8_E4M3", "float32": "F32", "float16": "F16", "int32": "I32", "int64": "I64"}
        dtype = {**known, "int8": "I8", "uint8": "U8"}[str(array.dtype)]
        header[name] = {"dtype": dtype, "shape": array.shape, "data_offsets": [at, at + array.nbytes]}
        data, at = data + array.tobytes(), at + array.nbytes
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


@pytest.mark.parametrize("method", FORMATS)
def test_what_is_loaded_is_what_the_codes_stand_for(method, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("rootcellar.models.packing._PART", 200)  # every tensor in several parts
    twin, told = write(tmp_path, method), []
    got = load_params(tmp_path, load_config(tmp_path), jnp.float32, advance=told.append)
    expected = load_params(twin, load_config(twin), jnp.float32)
    jax.tree.map(np.testing.assert_array_equal, got, expected)
    assert not caplog.records  # no part is left over
    assert sum(told) == sum(leaf.nbytes for leaf in jax.tree.leaves(got))


def test_scales_of_kv_are_named(tmp_path, caplog):
    make_checkpoint("llama2", tmp_path, **SMALL)
    tensors = make_tensors(make_config("llama2", **SMALL), 0)
    tensors["model.layers.0.self_attn.k_scale"] = np.ones(1, np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    load_params(tmp_path, load_config(tmp_path), jnp.float32)
    assert "1 scales of KV in" in caplog.text
    assert "self_attn.k_scale" in caplog.text


def spoil(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_all(tensors, folder / "model.safetensors")


Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{Q}.qzeros"), r"q_proj.qzeros' is missing, which belongs"),
        (lambda t: t.update({f"{Q}.scales": t[f"{Q}.scales"][:, :8].copy()}), r"q_proj.scales' is F16 .*should be"),
        (lambda t: t.update({f"{Q}.qweight": t[f"{Q}.qweight"].astype(np.int64)}), r"q_proj.qweight' is I64"),
        (lambda t: t.update({f"{Q}.g_idx": t[f"{Q}.g_idx"] + 9}), r"q_proj.g_idx' names groups that are not there"),
        (lambda t: t.pop(f"{Q}.qweight"), r"'model.layers.0.self_attn.q_proj.weight' \[64, 64\] is missing"),
    ],
)
def test_parts_that_do_not_fit_are_named(change, message, tmp_path):
    write(tmp_path, "gptq")
    spoil(tmp_path, change)
    with pytest.raises(ModelError, match=message):
        check_weights(tmp_path, load_config(tmp_path))


def test_a_file_that_was_cut_is_named(tmp_path):
    write(tmp_path, "fp8")
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ModelError, match=r"model.safetensors is not a whole safetensors file"):
        load_params(tmp_path, load_config(tmp_path, weights=False), jnp.float32)


@pytest.mark.parametrize(
    ("described", "message"),
    [
        ({"quant_method": "bitsandbytes"}, r"quantised weights \(bitsandbytes\) are not supported; known: awq, comp"),
        ({"quant_method": "gptq", "bits": 3}, r"quantization_config.bits=3 is not supported; known: 4"),
        ({"quant_method": "awq", "version": "marlin"}, r"quantization_config.version='marlin'"),
        ({"quant_method": "compressed-tensors", "format": "marlin-24"}, r"quantization_config.format='marlin-24'"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, r"weight_block_size=\[128\] must be two whole numbers"),
    ],
)
def test_what_is_not_known_is_refused_by_name(described, message, tmp_path):
    make_checkpoint("llama2", tmp_path, **SMALL, quantization_config=described)
    with pytest.raises(ModelError, match=message):
        load_config(tmp_path)
