"""Checkpoints of few bits that the formats' own libraries wrote, against those libraries' own reading of them.

Logits are those of transformers over the weights that it expands itself, in float32; ours may be off by TOLERANCE.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from safetensors.numpy import save_file as save_numpy

from rootcellar.errors import ModelError
from rootcellar.models.config import load_config
from rootcellar.models.decoder import forward, logits
from rootcellar.models.dense import make_mix_dense
from rootcellar.models.loader import load_params

pytestmark = pytest.mark.reference
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TOLERANCE = 2e-4  # of a logit, of which the greatest are about 10
IDS = np.random.default_rng(3).integers(0, 384, 70).tolist()
SIZES = {
    "vocab_size": 384, "hidden_size": 256, "intermediate_size": 320, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 1024, "initializer_range": 0.1,
    "eos_token_id": None, "bos_token_id": None, "pad_token_id": None, "tie_word_embeddings": False,
}  # fmt: skip


def made(kind, **more):
    torch.manual_seed(11)
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **more})
    return transformers.AutoModelForCausalLM.from_config(config).float().eval()


def theirs(model):
    with torch.no_grad():
        return model(torch.tensor([IDS])).logits[0].numpy()


def ours(folder):
    cfg = load_config(folder)
    params = load_params(folder, cfg, jnp.float32)
    mix = make_mix_dense(cfg, [len(IDS)])
    return np.asarray(logits(params, cfg, jax.jit(lambda p: forward(p, cfg, jnp.array(IDS, jnp.int32), mix))(params)))


def written(folder, model, tensors, described):
    """A folder with these tensors instead of the model's own."""
    from safetensors.torch import save_file

    model.save_pretrained(folder)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": described}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("kind", ["Qwen3", "DeepseekV3"])
@pytest.mark.parametrize("scale", ["float", "ue8m0"])
def test_fp8_in_blocks(kind, scale, tmp_path):
    from safetensors.torch import save_file
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize

    described = transformers.FineGrainedFP8Config(weight_block_size=(64, 32), scale_fmt=scale)
    latent = {
        "head_dim": 32,
        "num_key_value_heads": 4,
        "kv_lora_rank": 64,
        "q_lora_rank": 64,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 32,
        "v_head_dim": 64,
    }
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "n_group": 1}
    more = {**latent, **experts, "topk_group": 1, "first_k_dense_replace": 1} if kind == "DeepseekV3" else {}
    model = made(kind, **more)
    model.save_pretrained(tmp_path)
    quantizer = type("Holder", (), {"quantization_config": described})()
    tensors, floats = {}, {}
    for name, array in load_file(tmp_path / "model.safetensors").items():
        parts = {name: torch.from_numpy(array)}
        if name.endswith("proj.weight"):
            parts = Fp8Quantize(quantizer).convert(parts)
        tensors |= parts
        scales = parts.get(f"{name}_scale_inv")
        whole = parts[name]
        floats[name] = (
            whole if scales is None else Fp8Dequantize(quantizer)._dequantize_one(whole, scales, torch.float32)
        )
    assert any(tensor.dtype == torch.float8_e4m3fn for tensor in tensors.values())
    # (transformers reads such a folder where accelerate is installed; here it reads what its own function made of it.)
    save_file(floats, tmp_path / "model.safetensors", metadata={"format": "pt"})
    expected = theirs(transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval())
    written(tmp_path, model, tensors, described.to_dict())
    np.testing.assert_allclose(ours(tmp_path), expected, atol=TOLERANCE, rtol=0)


def test_mxfp4(tmp_path):
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    model = made("GptOss", num_local_experts=4, num_experts_per_tok=2, intermediate_size=64, sliding_window=24)
    random, tensors = torch.Generator().manual_seed(5), {}
    for name, tensor in model.state_dict().items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            tensors[name] = tensor
            continue
        experts, inputs, outputs = tensor.shape
        blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), generator=random, dtype=torch.uint8)
        scales = torch.randint(118, 124, (experts, outputs, inputs // 32), generator=random, dtype=torch.uint8)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        tensor.copy_(convert_moe_packed_tensors(blocks, scales, dtype=torch.float32))
    written(tmp_path, model, tensors, {"quant_method": "mxfp4"})
    np.testing.assert_allclose(ours(tmp_path), theirs(model), atol=TOLERANCE, rtol=0)


SCHEMES = {
    "pack-quantized": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": False},
    "pack-quantized-symmetric": {"num_bits": 4, "type": "int", "strategy": "channel", "symmetric": True},
    "int-quantized": {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True},
    "float-quantized": {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True},
}


@pytest.mark.parametrize("name", SCHEMES)
def test_compressed_tensors(name, tmp_path):
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus, apply_quantization_config
    from compressed_tensors.quantization.utils import calculate_qparams

    model, form = made("Llama"), name.removesuffix("-symmetric")
    described = QuantizationConfig(
        config_groups={"group_0": {"targets": ["Linear"], "weights": SCHEMES[name]}}, ignore=["lm_head"], format=form,
        quantization_status=QuantizationStatus.FROZEN,
    )  # fmt: skip
    apply_quantization_config(model, described)
    for module in model.modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is None:
            continue
        weight = module.weight.detach()
        parts = weight.reshape(len(weight), -1, scheme.weights.group_size or weight.shape[1])
        scale, zero = calculate_qparams(parts.amin(-1), parts.amax(-1), scheme.weights)
        module.weight_scale.data.copy_(scale)
        if not scheme.weights.symmetric:
            module.weight_zero_point.data.copy_(zero)
    compressor = ModelCompressor.from_pretrained_model(model, quantization_format=form)
    compressor.compress_model(model)
    tensors = {key: value.clone() for key, value in model.state_dict().items()}
    compressor.decompress_model(model)
    expected = theirs(model)
    from safetensors.torch import save_file

    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = {**model.config.to_dict(), "architectures": ["LlamaForCausalLM"]}
    config["quantization_config"] = {**described.to_dict(), "quant_method": "compressed-tensors"}
    (tmp_path / "config.json").write_text(json.dumps(config, default=str))
    np.testing.assert_allclose(ours(tmp_path), expected, atol=TOLERANCE, rtol=0)


def permuted(tensor, heads):
    """Rows of queries or keys in llama.cpp's order (``LlamaModel.permute`` of its converter)."""
    return tensor.reshape(heads, 2, len(tensor) // heads // 2, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)


@pytest.mark.parametrize(
    ("kind", "arch"), [("Llama", "llama"), ("Qwen2", "qwen2"), ("Qwen3", "qwen3"), ("Gemma2", "gemma2")]
)
def test_gguf(kind, arch, tmp_path):
    gguf = pytest.importorskip("gguf")
    from gguf import GGMLQuantizationType as Type

    model = made(kind, **({"query_pre_attn_scalar": 64, "tie_word_embeddings": True} if kind == "Gemma2" else {}))
    model.save_pretrained(tmp_path / "floats")
    floats = load_file(tmp_path / "floats" / "model.safetensors")
    names = gguf.get_tensor_name_map(
        next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch), SIZES["num_hidden_layers"]
    )
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", arch)
    writer.add_block_count(SIZES["num_hidden_layers"])
    writer.add_head_count(SIZES["num_attention_heads"])
    writer.add_head_count_kv(SIZES["num_key_value_heads"])
    types = [Type.Q8_0, Type.Q4_0, Type.BF16, Type.F16]
    for index, (name, array) in enumerate(sorted(floats.items())):
        own, kind_of = names.get_name(name, try_suffixes=(".weight", ".bias")), types[index % len(types)]
        if array.ndim == 1:
            kind_of = Type.F32
        codes = gguf.quants.quantize(array, kind_of)
        floats[name] = gguf.quants.dequantize(codes, kind_of).astype(np.float32)
        if arch == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            codes = permuted(codes, SIZES["num_attention_heads" if "q_proj" in name else "num_key_value_heads"])
        writer.add_tensor(own, codes + 1 if arch == "gemma2" and "norm" in name else codes, raw_dtype=kind_of)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    save_numpy(floats, tmp_path / "floats" / "model.safetensors", metadata={"format": "pt"})
    expected = theirs(
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "floats", dtype=torch.float32).eval()
    )
    (tmp_path / "floats" / "config.json").rename(tmp_path / "config.json")
    np.testing.assert_allclose(ours(tmp_path), expected, atol=TOLERANCE, rtol=0)
    whole = (tmp_path / "model.gguf").read_bytes()
    (tmp_path / "model.gguf").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match=r"model\.gguf is not a whole GGUF file"):
        ours(tmp_path)
