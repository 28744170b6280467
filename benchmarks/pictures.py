"""Time to the first token of a second question about a picture, beside that of the first.

    .venv/bin/python benchmarks/pictures.py [--quarters 1] [--pages 1,16] [--side 420] [--rounds 3] [--json]

The model has the shapes of Qwen2.5-VL-3B, a quarter of its 32 encoder blocks and of its 36 layers (``--quarters``), and
weights drawn at random. Each round shows a new picture: a first question encodes it and computes its KV, a second one,
of other words behind it, does neither. Programs are compiled before; medians are told.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import rootcellar
from checkpoints import make_config, picture

PLACE, BEGINS, ENDS = 500, 501, 502
WORDS = 12
"""Tokens of a question."""


def write_model(folder, quarters):
    """The model's folder: its config alone, as weights are drawn."""
    vision = {
        **make_config("qwen2-5-vl")["vision_config"], "depth": 8 * quarters, "hidden_size": 1280, "num_heads": 16,
        "intermediate_size": 3420, "out_hidden_size": 2048, "window_size": 112,
        "fullatt_block_indexes": [8 * i + 7 for i in range(quarters)],
    }  # fmt: skip
    config = make_config(
        "qwen2-5-vl", hidden_size=2048, intermediate_size=11008, num_hidden_layers=9 * quarters, num_attention_heads=16,
        num_key_value_heads=2, head_dim=128, max_position_embeddings=4096, vision_config=vision, torch_dtype="bfloat16",
        rope_scaling={"type": "mrope", "mrope_section": [16, 24, 24]},
    )  # fmt: skip
    (Path(folder) / "config.json").write_text(json.dumps(config))


def ask(engine, words, shown):
    """Seconds to the first token, and what is said of it."""
    ids = [*range(16, 28), BEGINS, PLACE, ENDS, *range(words, words + WORDS)]
    began = time.perf_counter()
    sampling = {"temperature": 0, "max_new_tokens": 1, "ignore_eos": True}
    meta = engine.generate(input_ids=ids, image_data=[shown], sampling_params=sampling)["meta_info"]
    return time.perf_counter() - began, meta


def measure(engine, page, side, rounds):
    first, second = [], []
    for i in range(rounds + 1):  # the first compiles
        shown = picture(i, side, side)
        before = engine.stats()["encoder"]["encoded"]
        took, _ = ask(engine, 40, shown)
        again, meta = ask(engine, 80, shown)
        assert engine.stats()["encoder"]["encoded"] == before + 1
        first.append(took)
        second.append(again)
    took, again = statistics.median(first[1:]), statistics.median(second[1:])
    counts = {name: meta[name] for name in ("prompt_tokens", "image_tokens", "cached_tokens")}
    return {"page_size": page, **counts, "first": took, "second": again, "of it": again / took}


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quarters", type=int, default=1, help="of the model's blocks and layers")
    parser.add_argument("--pages", default="1,16", help="page sizes, by commas")
    parser.add_argument("--side", type=int, default=420, help="pixels of a picture's side")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rows = []
    if not args.json:
        print("| page | prompt | image | cached | first, s | second, s | of it |\n|" + "---|" * 7, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        write_model(folder, args.quarters)
        for page in map(int, args.pages.split(",")):
            options = {"page_size": page, "max_total_tokens": 4096, "max_running_requests": 2}
            options |= {"chunked_prefill_size": 512, "load_format": "dummy", "skip_tokenizer_init": True}
            with rootcellar.Engine(model_path=folder, **options) as engine:
                rows.append(measure(engine, page, args.side, args.rounds))
            if not args.json:
                show(rows[-1])
    if args.json:
        print(json.dumps(rows, indent=1))


def show(row):
    words = [row["page_size"], row["prompt_tokens"], row["image_tokens"], row["cached_tokens"]]
    words += [f"{row['first']:.2f}", f"{row['second']:.2f}", f"{row['of it']:.3f}"]
    print("| " + " | ".join(map(str, words)) + " |", flush=True)


if __name__ == "__main__":
    main()
