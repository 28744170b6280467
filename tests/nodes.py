"""A prefill node and a decode node, each a process (``node.py``) that is killed and stopped, and their clients."""

import collections
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import numpy as np

DEADLINE = 10.0
"""Seconds within which everybody is answered."""
PATIENCE = {"disaggregation_heartbeat_timeout": 1.5, "disaggregation_waiting_timeout": 6.0}
FAULTS = [(what, who) for what in ("kill", "stop", "wire") for who in ("prefill", "decode")]
CLIENTS = 4
LONG = [11, 13, 14, 15]
"""Prompts of 33 to 100 tokens."""
ROOMS = itertools.count(1)
MOST = 16
"""Tokens of an answer."""
HASTY = "--xla_backend_optimization_level=0"
SAYS = "node: "
WHOLE = "wire 0 0 0 0"


class Node:
    """A process of ``node.py``, always at the same ports."""

    def __init__(self, folder, log, mode, port, bootstrap, options, **server):
        engine = {"model_path": str(folder), "disaggregation_mode": mode, "disaggregation_bootstrap_port": bootstrap}
        engine |= {"tp_size": 1, **PATIENCE, **options}
        self.settings = {"engine": engine, "server": {"port": port, **server}}
        self.url, self.log = f"http://127.0.0.1:{port}", log
        self.start()

    def start(self):
        words = [sys.executable, str(Path(__file__).with_name("node.py")), json.dumps(self.settings)]
        flags = os.environ.get("XLA_FLAGS", "")
        if HASTY not in flags:  # at night, too: what starts again and again need not be fast
            flags += f" {HASTY}"
        if (devices := self.settings["engine"]["tp_size"]) > 1:
            flags += f" --xla_force_host_platform_device_count={devices}"
        env = os.environ | {"XLA_FLAGS": flags.strip()}
        with self.log.open("a") as said:
            self.process = subprocess.Popen(
                words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, text=True, env=env
            )

    def hear(self):
        for line in self.process.stdout:
            if line.startswith(SAYS):  # libraries say things, too
                return json.loads(line.removeprefix(SAYS))
        raise AssertionError(self.log.read_text()[-3000:])

    def do(self, wish):
        self.process.stdin.write(wish + "\n")
        self.process.stdin.flush()
        return self.hear()

    def send(self, sig):
        self.process.send_signal(sig)

    def end(self):
        self.send(signal.SIGKILL)
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


class Both:
    """Two nodes, and what is asked of them."""

    def __init__(self, case, folder, logs, wire="tcp", tp_sizes=(1, 1), **options):
        """``tp_sizes``: of the prefill node and of the decode node, on devices that are made up."""
        options = {"disaggregation_transfer_backend": wire, **options}
        gives, takes = ({**options, "tp_size": tp_size} for tp_size in tp_sizes)
        self.case = case
        ports = [free_port() for _ in range(3)]
        self.bootstrap = ports[2]
        self.prefill = Node(folder, logs / "prefill", "prefill", ports[0], ports[2], gives)
        self.decode = Node(folder, logs / "decode", "decode", ports[1], ports[2], takes, prefill_url=self.prefill.url)
        for node in (self.prefill, self.decode):
            assert node.hear() == "ready"
        self.outcomes = collections.Counter()
        for _ in range(2):  # whatever is left to compile
            self.ask(np.random.default_rng(0), "warm")
        self.is_whole(0)

    def post(self, node, body):
        """Its status and what it says; ``httpx.HTTPError``: it died."""
        with httpx.Client(timeout=60) as client:
            if not body.get("stream"):
                answer = client.post(f"{node.url}/generate", json=body)
                return answer.status_code, answer.json()
            with client.stream("POST", f"{node.url}/generate", json=body) as answer:
                if answer.status_code != 200:
                    return answer.status_code, json.loads(answer.read())
                lines = [line[6:] for line in answer.iter_lines() if line.startswith("data: {")]
                return 200, json.loads(lines[-1])

    def ask(self, rng, salt):
        """Ask as a router or as a client of the decode node does; ``(outcome, seconds)``."""
        return self.ask_about(LONG[rng.integers(len(LONG))], rng, salt)

    def ask_about(self, i, rng, salt):
        """The same about one prompt."""
        params = {"temperature": 0, "max_new_tokens": MOST, "ignore_eos": True}
        body = {"input_ids": self.case.prompts[i], "sampling_params": params, "cache_salt": salt}
        body["stream"] = bool(rng.integers(2))
        began = time.monotonic()
        beside = None
        if rng.integers(2):
            where = {"bootstrap_host": "127.0.0.1", "bootstrap_port": self.bootstrap, "bootstrap_room": next(ROOMS)}
            body |= where
            beside = threading.Thread(target=lambda: self.outcome(self.prefill, body, []))
            beside.start()
        outcome = self.outcome(self.decode, body, self.case.tokens[i][:MOST])
        if beside is not None:
            beside.join()
        return outcome, time.monotonic() - began

    def outcome(self, node, body, expected):
        try:
            status, said = self.post(node, body)
        except httpx.HTTPError:
            return "cut off"
        if status == 200 and "error" not in said:
            ids, reason = said["output_ids"], said["meta_info"]["finish_reason"]
            if reason["type"] != "abort":
                assert ids == expected, f"wrong tokens: {ids}, not {expected}"
                return "answered"
            said = reason
        assert json.dumps(said) not in ("{}", "null")
        return "error"

    def run(self, seed):
        """One seeded fault at a random moment."""
        rng = np.random.default_rng(seed)
        what, who = FAULTS[seed % len(FAULTS)]
        node = getattr(self, who)
        if what == "wire":
            likely = [0, 0, 0]
            likely[rng.integers(3)] = 0.03
            node.do(f"wire {seed} {' '.join(map(str, likely))}")
        found, failed = [], []
        rngs = rng.spawn(CLIENTS)

        def client(number):
            try:
                found.append(self.ask(rngs[number], f"{seed}-{number % 3}"))
            except BaseException as error:  # told by the test
                failed.append(error)

        threads = [threading.Thread(target=client, args=(number,)) for number in range(CLIENTS)]
        for thread in threads:
            thread.start()
        time.sleep(rng.random() ** 2 * 1.5)
        if what == "kill":
            node.end()
        elif what == "stop":
            node.send(signal.SIGSTOP)
            time.sleep(rng.random() * 3)
            node.send(signal.SIGCONT)
        for thread in threads:
            thread.join()
        if what == "kill":
            node.start()
            assert node.hear() == "ready"
        elif what == "wire":
            node.do(WHOLE)
        assert not failed, failed[0]
        late = [(outcome, seconds) for outcome, seconds in found if seconds > DEADLINE]
        assert not late, late
        for outcome, _ in found:
            self.outcomes[f"{what} {who}: {outcome}"] += 1
        self.is_whole(seed)
        return max(seconds for _, seconds in found)

    def is_whole(self, seed):
        """The next request works, and then nothing is left behind."""
        assert self.ask(np.random.default_rng(seed), f"{seed}-after")[0] == "answered"
        for node in (self.prefill, self.decode):
            until = time.monotonic() + DEADLINE
            while there := node.do("left"):
                assert time.monotonic() < until, there
                time.sleep(0.02)

    def run_all(self, seeds):
        """The longest that a client waited; says of each what became of it."""
        longest = 0.0
        for seed in seeds:
            print(f"seed {seed}: {' '.join(FAULTS[seed % len(FAULTS)])}", end="", flush=True)
            took = self.run(seed)
            longest = max(longest, took)
            print(f" {took:.2f} s", flush=True)
        print(f"longest {longest:.2f} s;", dict(sorted(self.outcomes.items())))
        return longest

    def close(self):
        for node in (self.prefill, self.decode):
            node.end()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
