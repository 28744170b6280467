"""What `rootcellar demo` prints, with an engine that only pretends."""

import io
from collections.abc import Iterator

import pytest
from rich.console import Console

from rootcellar.commands import demo


class PretendEngine:
    """Answers with a fixed text; a prompt seen since the last flush is cached but for 16 characters."""

    answer = "A page holds 16 tokens."

    def __init__(self, caches: bool = True) -> None:
        self.caches, self.seen, self.closed, self.prompts, self.flushed_after = caches, set(), False, [], None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.closed = True

    def chat_prompt(self, messages) -> str:
        return "".join(f"[{m['role']}]{m['content']}" for m in messages)

    def generate(self, *, prompt, sampling_params, stream=False):
        assert sampling_params["temperature"] == 0
        cached = len(prompt) - 16 if self.caches and prompt in self.seen else 0
        self.seen.add(prompt)
        self.prompts.append(prompt)
        parts = self._parts(prompt, cached)
        return parts if stream else list(parts)[-1]

    def _parts(self, prompt: str, cached: int) -> Iterator[dict]:
        meta = {"prompt_tokens": len(prompt), "cached_tokens": cached, "e2e_latency": 1.0}
        meta["first_token_latency"] = 0.02 if cached else 0.5
        for end in (6, 14, len(self.answer)):
            done = {"type": "stop"} if end == len(self.answer) else None
            yield {"text": self.answer[:end], "meta_info": {**meta, "completion_tokens": end, "finish_reason": done}}

    def flush_cache(self):
        self.seen.clear()
        self.flushed_after = len(self.prompts)

    def stats(self):
        shelf = {"size": 8192, "used": 4096, "cached": 4000, "free": 4096, "pinned": 1234}
        return {"cache": {"full": {"DEVICE": shelf}}}


def shown(engine: PretendEngine) -> tuple[int, str]:
    out = io.StringIO()
    code = demo.show(lambda: engine, Console(file=out, width=120, highlight=False))
    return code, out.getvalue()


def test_shows_text_times_hits_and_occupancy():
    engine = PretendEngine()
    code, text = shown(engine)
    assert code == 0
    assert engine.closed
    assert text.count("answer: A page holds 16 tokens.\n") == 4
    assert "500.0 ms" in text
    assert "20.0 ms" in text
    assert "4%" in text, "the cached time to first token against the cold one"
    assert "8,192" in text
    assert "1,234" in text
    assert [word for word in ("used", "cached", "free", "pinned") if word not in text] == []
    assert "\x1b[" not in text, "no escape codes outside a terminal"


def test_cold_is_rehearsed_and_forgotten():
    engine = PretendEngine()
    shown(engine)
    assert engine.flushed_after == 4
    rehearsed, shown_prompts = engine.prompts[:4], engine.prompts[4:]
    assert rehearsed == shown_prompts
    assert shown_prompts[0] == shown_prompts[1]
    assert shown_prompts[3].startswith(shown_prompts[2]), "the second turn continues the first"


def test_fails_when_the_repeated_prompt_was_not_cached():
    assert shown(PretendEngine(caches=False))[0] == 1


def test_a_broken_stream_ends_its_line_and_raises():
    class Breaks(PretendEngine):
        def _parts(self, prompt, cached):
            yield from list(super()._parts(prompt, cached))[:1]
            if len(self.prompts) > 4:
                raise RuntimeError("lost")

    with pytest.raises(RuntimeError, match="lost"):
        shown(Breaks())
