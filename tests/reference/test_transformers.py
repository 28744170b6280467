"""Live against Hugging Face transformers on torch, float32, from folders that transformers itself has saved.

Run with ``make test-reference``. The golden files hold the same comparison for the default suite.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import rootcellar
from rootcellar.models.config import load_config, read_config
from rootcellar.models.decoder import forward, logits
from rootcellar.models.dense import make_mix_dense
from rootcellar.models.loader import load_params
from rootcellar.models.rope import inverse_frequencies

pytestmark = pytest.mark.reference
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

NEW_TOKENS = 64
TOLERANCE = 1e-4  # of a log-probability
# Beside it, where transformers sums a recurrence in chunks, in another order: one logprob of -5.87 is 1.05e-4 off.
RELATIVE = {"qwen3_next": 1e-5}
COMMON = {
    "vocab_size": 384,
    "hidden_size": 256,
    "intermediate_size": 320,
    "num_hidden_layers": 3,
    "max_position_embeddings": 1024,
    "initializer_range": 0.1,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 64}


def sizes(heads, kv_heads, head_dim, tied, **more):
    shape = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim}
    return {**COMMON, **shape, "tie_word_embeddings": tied, **more}


DEEPSEEK = {
    **COMMON,
    "tie_word_embeddings": False,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 64,
    "q_lora_rank": 96,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 48,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 64,
    "n_group": 4,
    "topk_group": 2,
}


CASES = {
    "qwen2-2kv-tied": ("Qwen2Config", sizes(4, 2, 64, True)),
    "qwen2-1kv-d128": ("Qwen2Config", sizes(2, 1, 128, False)),
    "qwen2-yarn": ("Qwen2Config", sizes(4, 4, 64, False, rope_parameters=YARN)),
    "qwen3-4kv-d128": ("Qwen3Config", sizes(4, 4, 128, False)),
    "qwen3-1kv-tied": ("Qwen3Config", sizes(8, 1, 64, True, attention_bias=True)),
    "llama2-4kv": ("LlamaConfig", sizes(4, 4, 64, False, rms_norm_eps=1e-5, mlp_bias=True, attention_bias=True)),
    "llama3-2kv-d128": ("LlamaConfig", sizes(2, 2, 128, False, rope_parameters=LLAMA3)),
    "llama3-1kv-tied": ("LlamaConfig", sizes(4, 1, 64, True, rope_parameters=LLAMA3)),
    "mistral-2kv": ("MistralConfig", sizes(4, 2, 64, False, sliding_window=None)),
    "deepseek2-lite": (
        "DeepseekV2Config",
        {**DEEPSEEK, "q_lora_rank": None, "rope_parameters": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707}},
    ),
    "deepseek2": (
        "DeepseekV2Config",
        {**DEEPSEEK, "topk_method": "group_limited_greedy", "routed_scaling_factor": 4.0},
    ),
    "deepseek3": ("DeepseekV3Config", {**DEEPSEEK, "attention_bias": True}),
}


HYBRID = {
    "mistral-window": ("MistralConfig", sizes(4, 2, 64, False, sliding_window=24)),
    "gemma3": (
        "Gemma3TextConfig",
        sizes(
            4,
            1,
            64,
            True,
            sliding_window=24,
            query_pre_attn_scalar=40,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            final_logit_softcapping=30.0,
        ),
    ),
    "gpt-oss": (
        "GptOssConfig",
        sizes(4, 2, 32, False, sliding_window=24, num_local_experts=6, num_experts_per_tok=3, intermediate_size=96),
    ),
    "llama4": (
        "Llama4TextConfig",
        sizes(
            4,
            2,
            32,
            False,
            attention_chunk_size=32,
            floor_scale=16,
            no_rope_layer_interval=3,
            interleave_moe_layer_step=2,
            num_local_experts=4,
            num_experts_per_tok=2,
            intermediate_size_mlp=192,
        ),
    ),
}
RECURRENT = {
    "bamba": (
        "BambaConfig",
        sizes(4, 2, 64, False, attn_layer_indices=[1], mamba_n_heads=8, mamba_n_groups=2, mamba_d_state=24),
    ),
    "qwen3-next": (
        "Qwen3NextConfig",
        sizes(
            4,
            2,
            64,
            False,
            layer_types=["linear_attention", "linear_attention", "full_attention"],
            linear_num_value_heads=8,
            linear_num_key_heads=2,
            linear_key_head_dim=24,
            linear_value_head_dim=32,
            num_experts=6,
            num_experts_per_tok=3,
            moe_intermediate_size=64,
            shared_expert_intermediate_size=96,
            mlp_only_layers=[1],
        ),
    ),
}
ALL = {**CASES, **HYBRID, **RECURRENT}


@pytest.fixture(scope="module", params=ALL)
def model(request):
    """A random model of transformers; biases and norms random as well, so that forgetting one shows."""
    kind, fields = ALL[request.param]
    torch.manual_seed(7)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**fields)).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:  # around what they begin as: one, or zero where one is added
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.2)
        for name, buffer in model.named_buffers():
            if name.endswith("bias"):
                buffer.normal_(0, 0.2)
    return model


@pytest.fixture(scope="module", params=["single", "sharded"])
def folder(request, model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    model.save_pretrained(folder, max_shard_size="1MB" if request.param == "sharded" else "5GB")
    assert (folder / "model.safetensors.index.json").exists() == (request.param == "sharded")
    return folder


@pytest.fixture(scope="module")
def prompts():
    random = np.random.default_rng(5)
    shared = random.integers(0, COMMON["vocab_size"], 90).tolist()
    lengths = [1, 2, 3, 7, 15, 16, 17, 30, 31, 33, 47, 63, 64, 65, 90, 120]
    rows = [random.integers(0, COMMON["vocab_size"], n).tolist() for n in lengths]
    return [shared[: n // 2] + row[n // 2 :] for n, row in zip(lengths, rows, strict=True)]


@pytest.fixture(scope="module")
def answers(model, prompts):
    """Each prompt's greedy tokens, the gap between the two best at each of them, and its own tokens' logprobs."""
    # Llama 4's temperature counts the padding before a row: there each runs alone.
    alone = model.config.model_type == "llama4_text"
    result = []
    for batch in [[prompt] for prompt in prompts] if alone else [prompts]:
        width = max(map(len, batch))
        with torch.no_grad():
            out = model.generate(
                torch.tensor([[0] * (width - len(p)) + p for p in batch]),
                attention_mask=torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in batch]),
                do_sample=False,
                max_new_tokens=NEW_TOKENS,
                output_logits=True,
                return_dict_in_generate=True,
                pad_token_id=0,
            )
            best = torch.log_softmax(torch.stack(out.logits, 1), -1).topk(2).values
            own = [prompt_logprobs(model, torch.tensor(prompt)) for prompt in batch]
        result += zip(out.sequences[:, width:].tolist(), (best[..., 0] - best[..., 1]).numpy(), own, strict=True)
    return result


def prompt_logprobs(model, ids):
    scores = torch.log_softmax(model(ids[None]).logits[0], -1)[:-1]
    return scores.gather(1, ids[1:, None])[:, 0].numpy()


def assert_same_tokens(got, tokens, gaps):
    """Equal; or first different where transformers' two best are equal to the last bits, and their order is chance."""
    assert len(got) == len(tokens)
    differing = [i for i, (a, b) in enumerate(zip(got, tokens, strict=True)) if a != b]
    assert not differing or gaps[differing[0]] < TOLERANCE, f"differs at {differing[0]}, gap {gaps[differing[0]]}"


def test_the_decoder_equals_transformers(model, folder, prompts, answers):
    cfg = load_config(folder)
    params = load_params(folder, cfg, jnp.float32)
    rows = [prompt + tokens for prompt, (tokens, _, _) in zip(prompts, answers, strict=True)]
    width = max(map(len, rows))
    tokens = jnp.array([row + [0] * (width - len(row)) for row in rows], jnp.int32)
    mix = make_mix_dense(cfg, [width] * len(rows))
    hidden = jax.jit(lambda p: forward(p, cfg, tokens.reshape(-1), mix))(params)
    scores = np.asarray(jax.nn.log_softmax(logits(params, cfg, hidden))).reshape(*tokens.shape, -1)
    for row, prompt, (expected, gaps, own) in zip(scores, prompts, answers, strict=True):
        n = len(prompt)
        relative = RELATIVE.get(model.config.model_type, 0)
        np.testing.assert_allclose(row[np.arange(n - 1), prompt[1:]], own, atol=TOLERANCE, rtol=relative)
        assert_same_tokens(row[n - 1 : n - 1 + NEW_TOKENS].argmax(-1).tolist(), expected, gaps)


@pytest.mark.parametrize("folder", ["single"], indirect=True)  # how it was saved is the loader's matter
def test_the_engine_equals_transformers_cold_and_cached(model, folder, prompts, answers):
    sampling = {"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True}
    with rootcellar.Engine(
        model_path=str(folder), skip_tokenizer_init=True, max_total_tokens=8192, page_size=16, chunked_prefill_size=64,
        max_running_requests=8,
    ) as engine:  # fmt: skip
        for run in ("cold", "cached"):
            got = engine.generate(input_ids=prompts, sampling_params=sampling)
            for result, (tokens, gaps, _) in zip(got, answers, strict=True):
                assert_same_tokens(result["output_ids"], tokens, gaps)
            if run == "cached":
                cached = [result["meta_info"]["cached_tokens"] for result in got]
                whole = [(len(prompt) - 1) // 16 * 16 for prompt in prompts]
                if "recurrent" in engine.stats()["cache"]:  # a state is left where it saves 32 tokens
                    assert all(n - 32 <= c <= n for c, n in zip(cached, whole, strict=True))
                else:
                    assert cached == whole
        scored = engine.generate(input_ids=prompts, sampling_params=sampling, return_logprob=True, logprob_start_len=0)
        for result, (_, _, own) in zip(scored, answers, strict=True):
            values = [entry[0] for entry in result["meta_info"]["input_token_logprobs"][1:]]
            np.testing.assert_allclose(values, own, atol=TOLERANCE, rtol=RELATIVE.get(model.config.model_type, 0))


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "dynamic", "factor": 4.0},
        LLAMA3,
        {**LLAMA3, "factor": 32.0, "original_max_position_embeddings": 8192},
        YARN,
        {**YARN, "original_max_position_embeddings": 32768},
        {**YARN, "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False},
        {**YARN, "attention_factor": 1.25},
        {**YARN, "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.8},
    ],
)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_rope_frequencies_equal_transformers(rope, head_dim):
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_theta": 1e6, **rope}
    config = transformers.LlamaConfig(**{**sizes(4, 2, head_dim, False), "rope_parameters": rope})
    rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
    ours = read_config({**config.to_dict(), "architectures": ["LlamaForCausalLM"]}).rope
    np.testing.assert_allclose(inverse_frequencies(ours, head_dim), rotary.inv_freq.numpy(), rtol=1e-6)
    assert ours.attention_factor == pytest.approx(rotary.attention_scaling)
    assert set(ROPE_INIT_FUNCTIONS) >= {"linear", "dynamic", "llama3", "yarn"}  # the names are still these


@pytest.mark.parametrize("case", CASES)
def test_saved_configs_of_both_spellings_are_read_alike(case, tmp_path):
    kind, fields = CASES[case]
    getattr(transformers, kind)(**fields, architectures=[kind.replace("Config", "ForCausalLM")]).save_pretrained(
        tmp_path
    )
    new = json.loads((tmp_path / "config.json").read_text())
    cfg = load_config(tmp_path)
    rope = new.pop("rope_parameters")
    old = {
        **new,
        "rope_theta": rope.pop("rope_theta"),
        "rope_scaling": None if rope == {"rope_type": "default"} else rope,
    }
    assert read_config(old) == cfg
    for name in ("vocab_size", "hidden_size", "tie_word_embeddings"):
        assert vars(cfg)[name] == fields[name]
    layer = cfg.layers[0]
    assert layer.feed_forward.intermediate_size == fields["intermediate_size"]
    if "head_dim" in fields:
        assert layer.mixer.head_dim == fields["head_dim"]


@pytest.mark.parametrize("saved", ["another", "equal", "alone"])
def test_a_head_beside_tied_embeddings_is_what_transformers_makes_of_it(saved, tmp_path):
    """``tie_word_embeddings`` is true, and the file holds a head: another one, the same, or it and no embeddings."""
    torch.manual_seed(5)
    fields = {**sizes(4, 2, 64, True), "initializer_range": 0.1}
    transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**fields)).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].copy()
    if saved == "another":
        head += np.random.default_rng(0).standard_normal(head.shape, np.float32) / 10
    if saved == "alone":
        del tensors["model.embed_tokens.weight"]
    save_file({**tensors, "lm_head.weight": head}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    theirs = transformers.Qwen2ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = list(range(3, 40))
    with torch.no_grad():
        expected = prompt_logprobs(theirs, torch.tensor(ids))
    cfg = load_config(tmp_path)
    params = load_params(tmp_path, cfg, jnp.float32)
    hidden = forward(params, cfg, jnp.array(ids, jnp.int32), make_mix_dense(cfg, [len(ids)]))
    got = jax.nn.log_softmax(logits(params, cfg, hidden))[np.arange(len(ids) - 1), np.array(ids[1:])]
    np.testing.assert_allclose(got, expected, atol=TOLERANCE, rtol=0)
    tied = theirs.lm_head.weight.data_ptr() == theirs.model.embed_tokens.weight.data_ptr()
    assert ("head" not in params) == tied == (saved != "another")
