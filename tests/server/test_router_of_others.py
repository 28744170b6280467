"""A router that others wrote, unmodified, in front of a prefill node and two decode nodes: smg, and OpenAI's client."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from serving import Server, wait_until

pytestmark = pytest.mark.clients
openai = pytest.importorskip("openai")
PROMPT = "A KV cache keeps what was computed of every token before, so that the next one costs less. " * 3
TURNS = 4


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def counts(server):
    """What went over the wire, as a node counts it."""
    with server.client() as client:
        return client.get("/server_info").json()["internal_states"][0]["disaggregation"]


def test_smg_names_rooms_and_outlives_a_decode_node(tmp_path):
    smg = shutil.which("smg", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if smg is None:
        pytest.skip("smg is not installed")
    bootstrap, port = free_port(), free_port()
    words = ["--disaggregation-bootstrap-port", str(bootstrap), "--disaggregation-heartbeat-timeout", "2"]
    words += ["--disaggregation-waiting-timeout", "10"]  # some routers wait for both, also where one is gone
    words.append("--disaggregation-mode")
    with (
        Server(*words, "prefill", max_total_tokens=2048) as prefill,
        Server(*words, "decode", max_total_tokens=2048) as first,
        Server(*words, "decode", max_total_tokens=2048) as second,
        (tmp_path / "log").open("w") as log,
    ):
        routed = [word for node in (first, second) for word in ("--decode", node.url)]
        start = [smg, "launch", "--host", "127.0.0.1", "--port", str(port), "--policy", "round_robin"]
        start += ["--pd-disaggregation", "--prefill", prefill.url, str(bootstrap), *routed]
        with subprocess.Popen(start, stdout=log, stderr=log) as router:
            try:
                with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="any", max_retries=0) as client:
                    serves(client, prefill, first, second)
            finally:
                router.terminate()


def serves(client, prefill, first, second):
    def complete(prompt, **more):
        return client.completions.create(model="demo", prompt=prompt, max_tokens=8, temperature=0, **more)

    def ready():
        try:
            return complete("ready?")
        except openai.OpenAIError:
            return None

    wait_until(ready, 60)
    texts = {complete(f"{i}: {PROMPT}").choices[0].text for i in range(TURNS)}
    streamed = "".join(event.choices[0].text for event in complete(f"0: {PROMPT}", stream=True))
    assert streamed in texts
    chat = [{"role": "user", "content": PROMPT}]
    assert client.chat.completions.create(model="demo", messages=chat, max_tokens=4).choices[0].message.content
    gave, *took = map(counts, (prefill, first, second))
    assert gave["pages"] == sum(each["pages"] for each in took)
    assert all(each["pages"] for each in took), "both decode nodes were asked, and had their prompts computed"
    first.stop(signal.SIGKILL)
    first.process.wait()
    before = counts(second)["pages"]
    answers = [complete(f"after {i}: {PROMPT}").choices[0].text for i in range(TURNS)]
    assert all(answers)
    assert counts(second)["pages"] > before
    wait_until(lambda: counts(prefill)["open_rooms"] == 0)
