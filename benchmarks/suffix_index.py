"""What the index of text takes for a proposal, and for each token: a million tokens, each said somewhere before.

    .venv/bin/python benchmarks/suffix_index.py [--tokens 1000000] [--rounds 15] [--json]

The ring of tokens has been written over. A question is the last 24 tokens of a text; medians of the rounds, each of 500
questions.
"""

import argparse
import json
from statistics import median
from time import perf_counter

import numpy as np

from rootcellar.cache import Suffixes

OWNER = b"a" * 16
ASKED = 500


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    index, rng = Suffixes(args.tokens, 24, 32), np.random.default_rng(0)
    said = rng.integers(0, 1000, 20_000)
    began, added = perf_counter(), 0
    while added < 1.2 * args.tokens:
        at, cut = rng.integers(0, 8_000, 2)
        text = np.concatenate([said[at:], rng.integers(0, 1000, cut)])
        index.add(OWNER, text)
        added += len(text)
    adding = (perf_counter() - began) / added
    times = []
    for _ in range(args.rounds):
        questions = [said[at - 24 : at] for at in rng.integers(10_000, 19_000, ASKED)]
        began = perf_counter()
        for question in questions:
            index.find(OWNER, question, 15)
        times.append((perf_counter() - began) / ASKED)
    found = {
        "us_a_proposal": round(median(times) * 1e6, 2),
        "us_a_token_added": round(adding * 1e6, 3),
        "bytes_a_token": round(index.memory_bytes() / args.tokens, 2),
    }
    print(json.dumps(found) if args.json else found)


if __name__ == "__main__":
    main()
