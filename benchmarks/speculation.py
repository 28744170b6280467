"""What guessing ahead gains: tokens a second with and without it, by kind of work and by batch.

    python benchmarks/speculation.py --model-path FOLDER [--tokens 128] [--batch 1,4] [--work edit,agent,chat,again]

``edit``: a file of this repository stands in the prompt and is written again. ``agent``: a transcript of commands and
what they printed, made of the same files, that goes on. ``chat``: questions. ``again``: those questions a second time,
so that their answers went through the cache. All prompts of a kind are there at once, cached, and ``batch`` of them
decode at a time: where one ends the next begins, so with ``--prompts`` of a batch the last to end counts. Greedy.
Engines take turns. Prints the median ratio of the times that all answers took and each round's, how many tokens a step
gave, how many guessed tokens were right of how many, whether all tokens were equal, and what steps of each size took.
``--json``: each row as JSON.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import median
from time import perf_counter

import rootcellar

SOURCES = Path(rootcellar.__file__).parent
FILES = (
    "units.py",
    "cache/kind.py",
    "cache/slots.py",
    "errors.py",
    "cache/shelf.py",
    "scheduler/plan.py",
    "cache/key.py",
    "engine/clock.py",
    "cache/lease.py",
    "cache/words.py",
    "scheduler/ahead.py",
    "scheduler/snapshots.py",
    "scheduler/stages.py",
    "cache/match.py",
    "plan/sizing.py",
    "runner/batch.py",
)
QUESTIONS = (
    "What is a radix tree?",
    "Why is the sky blue?",
    "Give me three tips for learning to cook.",
    "Who was Ada Lovelace?",
    "How does a bicycle stay upright?",
    "Write a short story about a lighthouse.",
    "What is the capital of Peru, and why?",
    "Explain recursion to a child.",
    "How do I remove a stain from a shirt?",
    "Which planet is the largest?",
    "Write a poem about autumn.",
    "What does a compiler do?",
    "Describe the water cycle.",
    "Why do cats purr?",
    "How is bread made?",
    "What was the Renaissance?",
)
LINES = 60


def lines(name: str, count: int = LINES) -> list[str]:
    return (SOURCES / name).read_text(encoding="utf-8").splitlines()[:count]


def chat(engine: rootcellar.Engine, content: str, begun: str = "") -> list[int]:
    return engine.encode(engine.chat_prompt([{"role": "user", "content": content}], add_generation_prompt=True) + begun)


def edit(engine: rootcellar.Engine) -> list[list[int]]:
    """A file, and the beginning of the same with one change."""
    prompts = []
    for name in FILES:
        text = lines(name)
        asked = "Write this file again, with a comment at its top:\n```python\n" + "\n".join(text) + "\n```"
        prompts.append(chat(engine, asked, "```python\n# A comment.\n" + "\n".join(text[:4]) + "\n"))
    return prompts


def agent(engine: rootcellar.Engine) -> list[list[int]]:
    """Files were printed, a part of one is printed again and the next command is about to be."""
    prompts = []
    for name, other in zip(FILES, FILES[1:] + FILES[:1], strict=True):
        turns = [f"$ cat {each}\n" + "\n".join(lines(each, LINES // 2)) for each in (name, other, name)]
        turns[-1] = "\n".join(turns[-1].splitlines()[:6]) + "\n"
        prompts.append(chat(engine, "Go on with this session.", "\n\n".join(turns)))
    return prompts


def questions(engine: rootcellar.Engine) -> list[list[int]]:
    return [chat(engine, question) for question in QUESTIONS]


WORK = {"edit": edit, "agent": agent, "chat": questions, "again": questions}


def measure(
    engines: list[rootcellar.Engine], work: str, batch: int, tokens: int, count: int, rounds: int
) -> dict[str, object]:
    sampling = {"max_new_tokens": tokens, "temperature": 0, "ignore_eos": work in ("edit", "agent")}
    prompts = WORK[work](engines[0])[:count]
    spent: list[list[float]] = [[], []]
    equal, made, steps, guessed, right = True, 0, 0, 0, 0
    for engine in engines:
        before = sampling if work == "again" else {"max_new_tokens": 1, "temperature": 0}
        engine.generate(input_ids=prompts, sampling_params=before)
    for turn in range(rounds):
        found = {}
        if work != "again":  # of what it said in the round before it knows nothing
            engines[1]._parts.scheduler.guesses.forget()
        for i in (0, 1) if turn % 2 else (1, 0):
            begun = perf_counter()
            found[i] = engines[i].generate(input_ids=prompts, sampling_params=sampling)
            spent[i].append(perf_counter() - begun)
        equal &= [r["output_ids"] for r in found[0]] == [r["output_ids"] for r in found[1]]
        made += sum(r["meta_info"]["completion_tokens"] for r in found[1])
        steps += sum(r["meta_info"]["spec_verify_ct"] for r in found[1])
        guessed += sum(r["meta_info"]["spec_draft_token_num"] for r in found[1])
        right += sum(r["meta_info"]["spec_accept_token_num"] for r in found[1])
    faster = [round(plain / fast, 3) for plain, fast in zip(*spent, strict=True)]
    return {
        "work": work,
        "batch": batch,
        "faster": median(faster),
        "rounds": faster,
        "tokens_a_step": round(made / steps, 2),
        "right": f"{right}/{guessed}",
        "tokens_a_second": [round(made / sum(each), 1) for each in spent],
        "equal": equal,
    }


def run(arguments: argparse.Namespace, batch: int) -> None:
    options = {"model_path": arguments.model_path, "load_format": arguments.load_format, "max_total_tokens": 65536}
    options |= {"max_running_requests": batch}
    guessing = {"speculative_algorithm": "ngram", "speculative_num_draft_tokens": arguments.draft}
    with rootcellar.Engine(**options) as plain, rootcellar.Engine(**options, **guessing) as fast:
        engines = [plain, fast]
        for engine in engines:  # else the first of a size compiles
            engine.warm_up()
        for _ in range(2):
            fast.generate(input_ids=edit(fast)[:1], sampling_params={"max_new_tokens": 48, "temperature": 0})
        for work in arguments.work.split(","):
            row = measure(engines, work, batch, arguments.tokens, arguments.prompts, arguments.rounds)
            print(json.dumps(row) if arguments.json else "  ".join(f"{k} {v}" for k, v in row.items()), flush=True)
        known = fast._parts.scheduler.guesses._prices._known[False]
        print(json.dumps({"step_ms_by_tokens": {rows: round(1e3 * s, 2) for rows, s in sorted(known.items())}}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model-path", default="demo")
    parser.add_argument("--load-format", default="auto", help="'dummy': random weights, whose answers soon repeat")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--prompts", type=int, default=8, help="of each kind of work, at most 16")
    parser.add_argument("--batch", default="1")
    parser.add_argument("--work", default=",".join(WORK))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--draft", type=int, default=15)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    for word in arguments.batch.split(","):
        run(arguments, int(word))


if __name__ == "__main__":
    main()
