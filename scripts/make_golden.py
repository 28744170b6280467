"""Ask transformers (torch, CPU, float32) for the answers in tests/golden: greedy tokens and prompt log-probabilities.

    python scripts/make_golden.py [NAME ...]        # needs torch and transformers (see `make test-reference`)

Checkpoints come from tests/checkpoints.py, so only the answers are stored. A seed is refused when, anywhere in the
greedy text, the two best tokens lie closer than GAP: equality of tokens must mean something, and must not depend on
the last bit of a sum. So it is where a log-probability of 32 bits lies further than OFF from that of 64: nobody's could
be compared with it. The next seed is then tried.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from checkpoints import GOLDEN, PROCESSORS, make_checkpoint, make_config, picture

GAP = 1e-3  # in log-probability
OFF = 5e-5  # of 32 bits from 64, half of what tests allow us
NEW_TOKENS = 64
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-4kv": ("qwen2", {"num_key_value_heads": 4}),
    "qwen2-1kv-d128": ("qwen2", {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 128}),
    "qwen3": ("qwen3", {"num_key_value_heads": 4, "num_attention_heads": 8, "head_dim": 64}),
    "qwen3-tied-1kv-d128": ("qwen3", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "qwen2-5-vl": ("qwen2-5-vl", {}),
    "llama2": ("llama2", {"num_key_value_heads": 4}),
    "llama2-bias-linear": (
        "llama2",
        {"attention_bias": True, "mlp_bias": True, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    ),
    "llama2-dynamic": (
        "llama2",
        {"max_position_embeddings": 128, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    ),
    "llama3-d128": ("llama3", {"head_dim": 128, "num_key_value_heads": 2}),
    "llama3-tied": ("llama3", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "qwen2-yarn": (
        "qwen2",
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}},
    ),
    "mistral": ("mistral", {}),
    "mistral-window": ("mistral", {"sliding_window": 24}),
    "gemma3": ("gemma3", {}),
    "gemma3-linear": (
        "gemma3",
        {
            "num_hidden_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            "final_logit_softcapping": 20.0,
        },
    ),
    "gemma4": ("gemma4", {}),
    "gemma3-seeing": ("gemma3-seeing", {}),
    "gemma2": ("gemma2", {}),
    "gpt-oss": ("gpt-oss", {}),
    "llama4": ("llama4", {}),
    "bamba": ("bamba", {}),
    "bamba-one-group": (
        "bamba",
        {"mamba_n_groups": 1, "mamba_proj_bias": True, "mamba_conv_bias": False, "tie_word_embeddings": True},
    ),
    "qwen3-next": ("qwen3-next", {}),
    "qwen3-5": ("qwen3-5", {}),
    "qwen2-moe": ("qwen2-moe", {}),
    "qwen3-moe": ("qwen3-moe", {}),
    "phi3": (
        "phi3",
        {
            "original_max_position_embeddings": 64,
            "rope_scaling": {  # transformers takes one by the length of what it has: both are the same here
                "type": "longrope",
                "short_factor": [1.0 + pair / 8 for pair in range(12)],
                "long_factor": [1.0 + pair / 8 for pair in range(12)],
            },
        },
    ),
    "smollm3": ("smollm3", {}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", {}),
    "glm4": ("glm4", {}),
    "glm4-moe": ("glm4-moe", {}),
    "granite4": ("granite4", {}),
    "nemotron-h": ("nemotron-h", {}),
    "deepseek2-lite": (
        "deepseek2",
        {
            "q_lora_rank": None,
            "rope_scaling": {
                "type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 64,
                "mscale": 0.707,
                "mscale_all_dim": 0.707,
            },
        },
    ),
    "deepseek2": (
        "deepseek2",
        {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "routed_scaling_factor": 4.0},
    ),
    "deepseek3": ("deepseek3", {"attention_bias": True}),
    "deepseek3-yarn": (
        "deepseek3",
        {
            "q_lora_rank": None,
            "tie_word_embeddings": True,
            "rope_scaling": {
                "type": "yarn",
                "factor": 40.0,
                "original_max_position_embeddings": 64,
                "mscale": 1.0,
                "mscale_all_dim": 0.8,
            },
        },
    ),
}
PICTURES: dict[str, tuple[str, dict[str, Any]]] = {
    name: (name, {}) for name in ("qwen2-5-vl", "qwen3-5", "gemma3-seeing")
}
"""Those that are asked about pictures, too; their answers go to tests/golden/pictures."""


PIXELS = "pictures/pixels"
"""What image processors make of pictures, as digests: see ``preprocess``."""


def main() -> None:
    (GOLDEN / "pictures").mkdir(exist_ok=True, parents=True)
    for name in sys.argv[1:] or [*CASES, *(f"pictures/{name}" for name in PICTURES), PIXELS]:
        if name == PIXELS:
            (GOLDEN / f"{name}.json").write_text(json.dumps(preprocess(), indent=1) + "\n")
            continue
        pictures = name.startswith("pictures/")
        family, overrides = PICTURES[name.removeprefix("pictures/")] if pictures else CASES[name]
        for seed in range(20):
            answer = (ask_about_pictures if pictures else ask)(family, overrides, seed)
            if answer is not None:
                break
        else:
            raise SystemExit(f"{name}: no seed keeps the two best tokens apart")
        answer = {"family": family, "seed": seed, "overrides": overrides, **answer}
        (GOLDEN / f"{name}.json").write_text(json.dumps(answer, separators=(",", ":")) + "\n")
        kinds = len({t for row in answer["tokens"] for t in row})
        print(f"{name}: seed {seed}, {kinds} different tokens in the greedy text", flush=True)


def ask(family: str, overrides: dict[str, Any], seed: int) -> dict[str, Any] | None:
    """The answers for 16 prompts; None when the two best tokens came too close, or 32 bits are too few."""
    model = load(family, overrides, seed)
    prompts = make_prompts(make_config(family, **overrides)["vocab_size"], seed)
    # There each runs alone: a row's answer depends on the longest row beside it with dynamic rope, and on the padding
    # before it through Llama 4's temperature and a bias of Mamba's input projection.
    alone = family == "llama4" or overrides.get("mamba_proj_bias", False)
    alone = alone or overrides.get("rope_scaling", {}).get("rope_type") == "dynamic"
    batches = [[prompt] for prompt in prompts] if alone else [prompts]
    tokens: list[list[int]] = []
    for batch in batches:
        texts, gap = greedy(model, batch)
        if gap < GAP:
            return None
        tokens += texts
    scores = [prompt_logprobs(model, prompt) for prompt in prompts]
    exact = [prompt_logprobs(model.double(), prompt) for prompt in prompts]
    if max(float((a - b).abs().max()) for a, b in zip(scores, exact, strict=True) if len(a)) > OFF:
        return None
    return {"prompts": prompts, "tokens": tokens, "logprobs": [[round(float(x), 6) for x in row] for row in scores]}


def load(family: str, overrides: dict[str, Any], seed: int) -> Any:
    """The model of a checkpoint."""
    auto = transformers.AutoModelForImageTextToText if family in SEEING else transformers.AutoModelForCausalLM
    with tempfile.TemporaryDirectory() as folder:
        make_checkpoint(family, folder, seed=seed, **overrides)
        model, loaded = auto.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    if any(loaded.values()):
        raise SystemExit(f"transformers does not take this for a checkpoint of {family}: {loaded}")
    return model.eval()


def picture_prompts(vocab_size: int, token: int, seed: int) -> list[tuple[list[int], list[list[int]]]]:
    """Prompts, and seed, height and width of each of their pictures: none, one, two or three; first, between, last."""
    random = np.random.default_rng([seed, 17])

    def words(count: int) -> list[int]:
        return random.integers(0, vocab_size - 12, count).tolist()

    begin, end = [token + 1], [token + 2]
    shared, turn = words(20), words(9)
    one = [token]
    return [
        (words(24), []),
        ([*begin, *one, *end, *words(7)], [[1, 56, 84]]),
        ([*shared, *begin, *one, *end, *words(12)], [[2, 120, 70]]),
        ([*shared, *begin, *one, *end, *words(12)], [[3, 120, 70]]),
        ([*words(5), *one], [[4, 200, 56]]),
        ([*begin, *one, *end, *turn, *begin, *one, *end, *words(5)], [[1, 56, 84], [5, 33, 300]]),
        ([*shared, *begin, *one, *end, *words(12), *turn, *begin, *one, *end, *words(3)], [[2, 120, 70], [6, 1, 1]]),
        ([*one, *words(1), *one, *words(30), *one, *words(40)], [[7, 170, 140], [7, 170, 140], [8, 90, 91]]),
    ]


def ask_about_pictures(family: str, overrides: dict[str, Any], seed: int) -> dict[str, Any] | None:
    """The answers to prompts with pictures, each alone; None when the two best tokens came too close."""
    model, config = load(family, overrides, seed), make_config(family, **overrides)
    token = config.get("image_token_id", config.get("image_token_index"))
    asked = picture_prompts(config["vocab_size"], token, seed)
    answers: dict[str, list[Any]] = {"prompts": [], "pictures": [], "tokens": [], "logprobs": []}
    for prompt, drawn in asked:
        given, ids = SEEING[family](prompt, token, [picture(*each) for each in drawn])
        text, gap = greedy_anew(model, ids, NEW_TOKENS // 2, given)
        if gap < GAP:
            return None
        scores = prompt_logprobs(model, ids, **given)
        found = [None if to == token else round(float(x), 6) for x, to in zip(scores, ids[1:], strict=True)]
        for name, value in (("prompts", prompt), ("pictures", drawn), ("tokens", text), ("logprobs", found)):
            answers[name].append(value)
    return answers


def see_qwen(
    prompt: list[int], token: int, pictures: list[np.ndarray], **settings: Any
) -> tuple[dict[str, Any], list[int]]:
    """What a model of Qwen's is given of a prompt beside its ids, and those as it wants them."""
    if not pictures:
        return {}, prompt
    processor = transformers.models.qwen2_vl.image_processing_pil_qwen2_vl.Qwen2VLImageProcessorPil(**settings)
    seen = processor(images=[Image.fromarray(each) for each in pictures], return_tensors="pt")
    counts = iter((seen["image_grid_thw"].prod(-1) // 4).tolist())
    ids = [each for t in prompt for each in ([t] * next(counts) if t == token else [t])]
    kinds = torch.tensor([[int(t == token) for t in ids]], dtype=torch.int32)
    return {**seen, "mm_token_type_ids": kinds}, ids


def see_gemma(prompt: list[int], token: int, pictures: list[np.ndarray]) -> tuple[dict[str, Any], list[int]]:
    """What Gemma 3 is given of a prompt beside its ids, and those as it wants them."""
    if not pictures:
        return {}, prompt
    settings, count = PROCESSORS["gemma3"], make_config("gemma3-seeing")["mm_tokens_per_image"]
    processor = transformers.models.gemma3.image_processing_pil_gemma3.Gemma3ImageProcessorPil(**settings)
    seen = processor(images=[Image.fromarray(each) for each in pictures], return_tensors="pt")
    ids = [each for t in prompt for each in ([t] * count if t == token else [t])]
    kinds = torch.tensor([[int(t == token) for t in ids]], dtype=torch.int32)
    return {"pixel_values": seen["pixel_values"], "token_type_ids": kinds}, ids


def preprocess() -> dict[str, list[list[Any]]]:
    """For each model: seed, height and width of a picture (see ``picture``), and SHA-256 of its ``pixel_values``."""
    shapes = [(1, 1), (64, 64), (20, 300), (300, 20), (97, 131), (480, 640), (1200, 700), (33, 1000), (2000, 30)]
    made: dict[str, list[list[Any]]] = {}
    for name, see in SEEING.items():
        made[name] = []
        for seed, (height, width) in enumerate(shapes):
            given, _ = see([500], 500, [picture(seed, height, width)])
            values = given["pixel_values"].numpy().astype("<f4").tobytes()
            made[name].append([seed, height, width, hashlib.sha256(values).hexdigest()])
    return made


SEEING = {
    "qwen2-5-vl": see_qwen,
    "qwen3-5": partial(see_qwen, **PROCESSORS["qwen3_5"]),
    "gemma3-seeing": see_gemma,
}


def make_prompts(vocab_size: int, seed: int) -> list[list[int]]:
    """16 prompts of 1 to 100 random tokens; half of them begin alike."""
    random = np.random.default_rng([seed, 16])
    lengths = [1, 2, 3, 5, 8, 13, 16, 17, 24, 31, 32, 33, 48, 64, 80, 100]
    prompts = [random.integers(0, vocab_size, length).tolist() for length in lengths]
    shared = prompts[-1]
    return [shared[: len(p) // 2] + p[len(p) // 2 :] if i % 2 else p for i, p in enumerate(prompts)]


@torch.no_grad()
def greedy_anew(model: Any, prompt: list[int], new: int, given: dict[str, Any]) -> tuple[list[int], float]:
    """``new`` greedy tokens of a prompt that is computed anew for each, and the least gap between the two best.

    Not by ``generate``: where a prompt ends with a picture, it goes on from the picture's last place in each axis
    (transformers 5.23), and not from the greatest of all as it does when the answer comes back in a longer prompt.
    """
    ids, gap = list(prompt), float("inf")
    for _ in range(new):
        for name in {"mm_token_type_ids", "token_type_ids"} & given.keys():
            given = {**given, name: torch.nn.functional.pad(given[name], (0, len(ids) - given[name].shape[1]))}
        model.model.rope_deltas = None
        best = torch.log_softmax(model(torch.tensor([ids]), use_cache=False, **given).logits[0, -1].float(), -1).topk(2)
        gap = min(gap, float(best.values[0] - best.values[1]))
        ids.append(int(best.indices[0]))
    return ids[len(prompt) :], gap


@torch.no_grad()
def greedy(model: Any, prompts: list[list[int]]) -> tuple[list[list[int]], float]:
    """64 greedy tokens each, through transformers' own cache, and the least gap between the two best on the way."""
    width = max(map(len, prompts))
    out = model.generate(
        torch.tensor([[0] * (width - len(p)) + p for p in prompts]),
        attention_mask=torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts]),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        pad_token_id=0,
    )
    best = torch.log_softmax(torch.stack(out.logits).float(), -1).topk(2).values
    return out.sequences[:, width:].tolist(), float((best[..., 0] - best[..., 1]).min())


@torch.no_grad()
def prompt_logprobs(model: Any, prompt: list[int], **given: Any) -> torch.Tensor:
    """Log-probability of each prompt token but the first, given those before it."""
    scores = torch.log_softmax(model(torch.tensor([prompt]), **given).logits[0].float(), -1)
    return scores[:-1].gather(1, torch.tensor(prompt[1:]).long()[:, None])[:, 0]


if __name__ == "__main__":
    main()
