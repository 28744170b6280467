"""The examples run as their first lines say, and show what they promise."""

import re
import subprocess
import sys
from pathlib import Path

from serving import Server

ROOT = Path(__file__).parents[1]


def test_rl_rollout():
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "rl_rollout.py"], capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rounds = done.stdout.split("round ")[1:]
    assert len(rounds) == 3
    counts = [int(n) for n in re.findall(r"(\d+) compilations", "".join(rounds[1:]))]
    assert len(set(counts)) == 1  # after the first round nothing compiles
    held = [float(x) for x in re.findall(r"([\d.]+) MB in arrays", rounds[-1])]
    rolled_out, dropped, trained, rebuilt = held
    assert dropped == trained < rolled_out == rebuilt
    for each in rounds:
        hits, asked, stale = map(
            int, re.search(r"(\d+) of (\d+) prompt tokens were hits, (\d+) of them", each).groups()
        )
        assert stale == 0  # nothing that other weights computed
        assert asked / 2 < hits < asked  # but what the other answers of a round share
    assert any(float(loss) for loss in re.findall(r"loss ([-+][\d.]+)", done.stdout))  # there was something to learn


def test_http_rollout():
    with Server("--model-path", "demo", "--logprobs-mode", "processed_logprobs") as server:
        command = [sys.executable, ROOT / "examples" / "http_rollout.py", server.url]
        named, sent = (
            subprocess.run([*command, *words], capture_output=True, text=True, timeout=120, check=False)
            for words in ([], ["--wire"])
        )
    assert sent.returncode == 0, sent.stderr[-2000:]
    assert sent.stdout.count("weights are now 'step-") == 2
    done = named
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = done.stdout.split("step ")[1:3]
    assert "by weights {'0'}" in first
    assert "by weights {'step-0'}" in done.stdout
    for hits, asked in re.findall(r"(\d+) of (\d+) prompt tokens were hits", done.stdout):
        assert int(asked) / 2 < int(hits) < int(asked)  # what a group shares, and nothing of other weights
    assert len(re.findall(r"released ([1-9][\d.]*) MB", done.stdout)) == 2
    assert second
