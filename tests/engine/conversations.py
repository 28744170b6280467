"""Golden answers in two halves, with whatever a test does to the tiers in between."""

from idle import always_load

import rootcellar

FAMILIES = ["qwen2-4kv", "gemma3", "llama4", "deepseek3", "bamba", "qwen3-next"]
"""Full, window, chunked, latent, Mamba-2, gated delta."""
HALF = 32  # tokens of an answer after which its conversation is asked to go on
LONG = [11, 13, 14, 15]  # prompts of 33 to 100 tokens


def tiered(folder, **options):
    """An engine with host memory behind a small device, which loads whatever is there."""
    options = {"max_total_tokens": 512, "max_running_requests": 2, "chunked_prefill_size": 64, **options}
    options = {"enable_hierarchical_cache": True, **options}
    return always_load(rootcellar.Engine(model_path=folder, skip_tokenizer_init=True, **options))


def ask(engine, ids, most):
    return engine.generate(
        input_ids=ids, sampling_params={"temperature": 0, "max_new_tokens": most, "ignore_eos": True}
    )


def begin(engine, case, prompts=LONG):
    """The first half of each answer."""
    for i, first in zip(prompts, ask(engine, [case.prompts[i] for i in prompts], HALF), strict=True):
        assert first["output_ids"] == case.tokens[i][:HALF]


def go_on(engine, case, prompts=LONG):
    """The second half of each answer; of each, cached tokens by tier.

    What others loaded before counts as the device's.
    """
    seconds = ask(engine, [case.prompts[i] + case.tokens[i][:HALF] for i in prompts], HALF)
    for i, second in zip(prompts, seconds, strict=True):
        assert second["output_ids"] == case.tokens[i][HALF:]
        details = second["meta_info"]["cached_tokens_details"]
        assert sum(details.values()) == second["meta_info"]["cached_tokens"] <= len(case.prompts[i]) + HALF
    return [second["meta_info"]["cached_tokens_details"] for second in seconds]
