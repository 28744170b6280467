"""The least that a step reads, writes and computes, against what one counts by hand and token by token."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rootcellar import cli
from rootcellar.cache.kind import chunked_local, full, sliding_window
from rootcellar.plan.layers import read_architecture
from rootcellar.plan.presets import PRESETS
from rootcellar.plan.roofline import CHIPS, LeastTime, decode, expected_experts, held_bytes, least_time, prefill, seen
from rootcellar.plan.weights import matrices

MODELS = {name: read_architecture(config) for name, config in PRESETS.items()}


def test_a_decode_step_of_a_dense_model_by_hand():
    """Qwen2.5-3B on four devices: 36 layers, 2 KV heads of 128 that are repeated, bfloat16."""
    work = decode(MODELS["qwen2.5-3b"], "bfloat16", 4, 8, 4096)
    layers = 36 * (2048 * 128 * (2 * 16 + 2 * 2) + 3 * 2048 * 11008)
    assert work.nbytes == {
        "weights": layers * 2 / 4,
        "experts": 0,
        "vocabulary": (151936 * 2048 / 4 + 8 * 2048) * 2,
        "cache read": 8 * 4095 * 36 * 2 * 128 * 2,
        "cache written": 8 * 36 * 2 * 128 * 2,
    }
    assert work.flops["weights"] == 2 * 8 * layers / 4
    assert work.flops["vocabulary"] == 2 * 8 * 151936 * 2048 / 4
    assert work.flops["attention"] == 8 * 36 * 4 * 16 * 128 * 4096 / 4


@pytest.mark.parametrize("name", MODELS)
def test_more_is_never_less(name):
    model = MODELS[name]
    some = decode(model, "bfloat16", 1, 4, 3000)
    for more in (decode(model, "bfloat16", 1, 8, 3000), decode(model, "float32", 1, 4, 3000)):
        assert more.total_bytes > some.total_bytes
    longer = decode(model, "bfloat16", 1, 4, 6000)
    assert longer.total_bytes >= some.total_bytes
    assert longer.total_flops >= some.total_flops
    apart = decode(model, "bfloat16", 2, 4, 3000)
    assert some.total_bytes / 2 <= apart.total_bytes < some.total_bytes
    assert apart.total_flops == pytest.approx(some.total_flops / 2)


@pytest.mark.parametrize("name", MODELS)
def test_a_prompt_in_chunks_computes_what_it_does_at_once(name):
    """But for the head, which each chunk has once, and latents, which may be expanded."""
    model = MODELS[name]
    whole = prefill(model, "bfloat16", 1, 0, 1024)
    chunks = [prefill(model, "bfloat16", 1, at, at + 256) for at in range(0, 1024, 256)]
    assert sum(chunk.flops["weights"] for chunk in chunks) == whole.flops["weights"]
    assert sum(chunk.flops["attention"] for chunk in chunks) >= whole.flops["attention"]
    if name != "deepseek-v3":
        assert sum(chunk.flops["attention"] for chunk in chunks) == pytest.approx(whole.flops["attention"])
    assert whole.nbytes["cache read"] == 0
    assert whole.nbytes["weights"] == chunks[0].nbytes["weights"]


@given(st.integers(0, 300), st.integers(0, 60), st.integers(1, 50))
def test_what_queries_see_is_what_a_mask_lets_through(start, count, span):
    stop = start + count
    masks = {
        full("full", (0,)): lambda q, k: k <= q,
        sliding_window("window", (0,), span): lambda q, k: q - span < k <= q,
        chunked_local("chunk", (0,), span): lambda q, k: k <= q and k // span == q // span,
    }
    for kind, mask in masks.items():
        assert seen(kind, start, stop) == sum(mask(q, k) for q in range(start, stop) for k in range(stop))


@given(st.integers(1, 300), st.data())
def test_experts_that_a_batch_passes(of, data):
    chosen = data.draw(st.integers(1, of))
    assert expected_experts(of, chosen, 1) == pytest.approx(chosen)
    few, many = (expected_experts(of, chosen, n) for n in (3, 50))
    assert chosen * 0.999 <= few <= many <= of * 1.000001
    assert few == pytest.approx(of * (1 - (1 - chosen / of) ** 3))


def test_the_longer_time_is_the_limit():
    work = decode(MODELS["llama-4-scout"], "bfloat16", 8, 64, 8192)
    least = least_time(work, CHIPS["h100"])
    assert least == LeastTime(work.total_bytes / 3350e9, work.total_flops / 989e12)
    assert (least.bound, least.seconds) == ("memory", least.by_bandwidth)
    assert least_time(prefill(MODELS["qwen2.5-3b"], "bfloat16", 1, 0, 4096), CHIPS["v4"]).bound == "compute"


def test_what_a_device_holds():
    model = MODELS["qwen2.5-3b"]
    cache = 36 * 2 * 2 * 128 * 2
    assert held_bytes(model, "bfloat16", 1, 3, 100) == matrices(model).nbytes + 3 * 100 * cache
    window = MODELS["mistral-7b"]
    longest = held_bytes(window, "bfloat16", 1, 1, 100_000)
    assert longest == held_bytes(window, "bfloat16", 1, 1, 4095) < held_bytes(window, "bfloat16", 1, 2, 4095)


def plan(capsys, *words):
    status = cli.main(["plan", *words])
    said = capsys.readouterr()
    return status, said.out, said.err


def test_the_command(capsys):
    words = "qwen2.5-3b", "--tp", "4", "--roofline", "--batch", "8", "--context", "4096", "--program-bytes", "12.9GB"
    status, out, _ = plan(capsys, *words, "--json")
    told = json.loads(out)
    assert status == 0
    assert [row["chip"] for row in told["chips"]] == list(CHIPS)
    assert told["least_of_program_bytes"] == pytest.approx(2.147 / 12.9, abs=1e-3)
    assert all(row["fits"] and row["decode_tokens_per_second"] > 0 for row in told["chips"])
    status, out, _ = plan(capsys, *words, "--chip", "v5e")
    assert status == 0
    assert "17% of it needed" in out
    assert "v5e" in out
    assert "h100" not in out
    status, _, err = plan(capsys, "qwen2.5-3b", "--roofline", "--batch", "0")
    assert (status, "batch=0 is not allowed" in err) == (2, True)
