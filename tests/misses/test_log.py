"""``rootcellar explain LOG`` finds the habits that cost most, in a log of a thousand requests, without a model."""

from __future__ import annotations

import json
import random

import pytest

from rootcellar.cli import main

RULES = (
    "You answer for the keeper of a root cellar. Be short, be truthful, and never promise what is not on a shelf. " * 2
)
SHELF = "Shelf {0} holds jars of pickled vegetables, the oldest of them in front, and a list of what is in each jar. "
TOOLS = [f"tool_{name}: looks at the {name} and says how much of it is left and how long it will keep." for name in
         ("apples", "carrots", "onions", "pears", "beets")]  # fmt: skip


def request(i, rng):
    """One of five applications: three with a habit, two without."""
    question = {"role": "user", "content": f"Question {rng.randrange(10**6)}: how is shelf {rng.randrange(100)}?"}
    app = i % 5
    if app == 0:
        system = f"Today is 2026-{1 + i // 100:02}-{1 + i % 28:02}. {RULES}{SHELF.format(0)}"
    elif app == 1:
        tools = rng.sample(TOOLS, len(TOOLS))
        system = "\n".join(["You look after jars. These are your tools:", *tools, RULES])
    elif app == 2:
        return {"prompt": f"request-id={rng.randbytes(4).hex()} {RULES}{SHELF.format(2)}\n{question['content']}"}
    else:
        system = f"{SHELF.format(app)}{RULES}"
    return {"messages": [{"role": "system", "content": system}, question]}


def logged(folder, count):
    path, rng = folder / "log.jsonl", random.Random(0)
    lines = [json.dumps({"id": f"q{i}", "timestamp": i, "body": request(i, rng)}) for i in range(count)]
    path.write_text("\n".join([*lines, "no JSON", "{}"]), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("count", [200, 1000])
def test_the_three_habits_are_the_costliest(tmp_path, capsys, count):
    assert main(["explain", logged(tmp_path, count), "--json", "--prefill-rate", "1000"]) == 0
    out = capsys.readouterr()
    found = json.loads(out.out)
    assert found["requests"] == count
    assert out.err.count("skipped") == 2
    date, tools, header = (
        next(habit for habit in found["causes"][:3] if what in habit["example"]["before"] + habit["example"]["got"])
        for what in ("Today is", "tool_", "request-id")
    )
    assert (date["cause"], tools["cause"], header["cause"]) == ("changing_value", "reordered", "changing_value")
    for habit in (date, tools, header):
        assert habit["requests"] > 0.09 * count
        assert habit["price_seconds"] == pytest.approx(habit["price_tokens"] / 1000)
    others = sum(habit["price_tokens"] for habit in found["causes"][3:])
    assert others < 0.1 * sum(habit["price_tokens"] for habit in found["causes"])


def test_a_report_for_people_and_what_cannot_be_read(tmp_path, capsys):
    assert main(["explain", logged(tmp_path, 20)]) == 0
    told = capsys.readouterr().out
    assert told.startswith("20 requests: ")
    assert "changing_value" in told
    assert main(["explain", str(tmp_path / "none")]) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_a_wrong_model_is_told_and_a_wrong_line_is_passed_over(tmp_path, capsys):
    assert main(["explain", logged(tmp_path, 2), "--model-path", str(tmp_path / "none")]) == 2
    told = capsys.readouterr()
    assert "--model-path" in told.err
    assert "skipped" not in told.err
    path = tmp_path / "odd.jsonl"
    path.write_text('{"hash_ids": [1], "input_length": 1e999}\n{"input_ids": [1, 2, 3]}\n', encoding="utf-8")
    assert main(["explain", str(path)]) == 0
    told = capsys.readouterr()
    assert told.out.startswith("1 requests: ")
    assert told.err.count("skipped") == 1
