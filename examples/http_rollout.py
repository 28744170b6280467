"""Rollouts over HTTP, in the order in which verl and slime ask for them: generate, release, train, resume, update.

    rootcellar serve --model-path demo --logprobs-mode processed_logprobs
    python examples/http_rollout.py http://127.0.0.1:30000

The requests are SGLang's, so a trainer that speaks to SGLang needs nothing else; this script needs only Python, and for
the trainer's part safetensors. Both read the same disk: the trainer writes a checkpoint, the server reads it. With
``--wire`` they need not: the weights are sent.
"""

from __future__ import annotations

import argparse
import base64
import json
import shutil
import tempfile
import urllib.request
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 - so that numpy knows bfloat16
import numpy as np
from safetensors.numpy import load_file, save, save_file

SYSTEM = "You are the manual of rootcellar, an LLM inference engine. Answer in one or two short sentences."
QUESTIONS = ["What is a KV cache?", "What does page_size do?"]
GROUP = 4  # answers to each question
PART = 4 << 20  # bytes of tensors in a body


def post(url: str, path: str, **body: Any) -> Any:
    """The answer to a POST request."""
    request = urllib.request.Request(url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.load(response)


def get(url: str, path: str) -> Any:
    """The answer to a GET request."""
    with urllib.request.urlopen(url + path, timeout=120) as response:
        return json.load(response)


def rollout(url: str, prompts: list[list[int]], seed: int) -> list[dict[str, Any]]:
    """``GROUP`` answers to each prompt: token ids in, token ids and their logprobs out."""
    sampling = {"temperature": 1.0, "max_new_tokens": 48, "n": GROUP, "sampling_seed": seed}
    answers: list[dict[str, Any]] = post(
        url, "/generate", input_ids=prompts, sampling_params=sampling, return_logprob=True
    )
    return answers


def train(folder: Path, into: Path, seed: int) -> None:
    """Where a trainer learns from the answers: here it shakes the weights, and writes them as a trainer would."""
    shutil.copytree(folder, into)
    random = np.random.default_rng(seed)
    tensors = load_file(into / "model.safetensors")
    shaken = {
        name: (tensor.astype(np.float32) * (1 + 0.02 * random.standard_normal(tensor.shape))).astype(tensor.dtype)
        for name, tensor in tensors.items()
    }
    save_file(shaken, into / "model.safetensors", metadata={"format": "pt"})


def send(url: str, folder: Path, version: str) -> dict[str, Any]:
    """Push weights without a file: safetensors, in several bodies; the last one's answer. Used when all are there."""
    parts: list[dict[str, Any]] = [{}]
    for name, tensor in load_file(folder / "model.safetensors").items():
        if sum(each.nbytes for each in parts[-1].values()) + tensor.nbytes > PART:
            parts.append({})
        parts[-1][name] = tensor
    for part in parts:
        text = base64.b64encode(save(part)).decode()
        body = {"serialized_named_tensors": [text], "load_format": "safetensors", "weight_version": version}
        updated: dict[str, Any] = post(url, "/update_weights_from_tensor", flush_cache=False, **body)
    assert not updated["missing"]
    return updated


def main() -> None:
    """Two steps of it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("url")
    parser.add_argument("--wire", action="store_true", help="send the weights instead of naming a folder")
    arguments = parser.parse_args()
    url = arguments.url.rstrip("/")
    folder = Path(get(url, "/get_model_info")["model_path"])
    if str(folder) == "demo":
        from rootcellar import demo

        folder = demo.path()
    system = {"role": "system", "content": SYSTEM}
    chats = [[system, {"role": "user", "content": question}] for question in QUESTIONS]
    prompts = [post(url, "/tokenize", messages=chat, add_generation_prompt=True)["tokens"] for chat in chats]
    with tempfile.TemporaryDirectory() as room:
        for step in range(2):
            answers = rollout(url, prompts, step)
            hits = sum(answer["meta_info"]["cached_tokens"] for answer in answers)
            asked = sum(answer["meta_info"]["prompt_tokens"] for answer in answers)
            logprob = np.mean([each[0] for a in answers for each in a["meta_info"]["output_token_logprobs"]])
            versions = {answer["meta_info"]["weight_version"] for answer in answers}
            print(
                f"step {step}: {len(answers)} answers by weights {versions}, {hits} of {asked} prompt tokens were hits"
            )
            print(f"  mean logprob {logprob:.3f}, the first: {answers[0]['text']!r}")
            post(url, "/pause_generation", mode="retract")
            post(url, "/flush_cache")
            # Weights that were sent stay: there is no folder from which the server could have them again.
            tags = ["kv_cache"] if arguments.wire else ["kv_cache", "weights"]
            freed = post(url, "/release_memory_occupation", tags=tags)
            print(f"  released {freed['bytes'] / 1e6:.1f} MB; training ...")
            train(folder, trained := Path(room) / f"step-{step}", step)
            if not arguments.wire:
                post(url, "/resume_memory_occupation", tags=["weights"])
            version = f"step-{step}"  # and nothing that other weights computed is a hit again
            if arguments.wire:
                updated = send(url, trained, version)
            else:
                updated = post(url, "/update_weights_from_disk", model_path=str(trained), weight_version=version)
            post(url, "/resume_memory_occupation", tags=["kv_cache"])
            post(url, "/continue_generation")
            print(f"  weights are now {updated['weight_version']!r}")
            folder = trained


if __name__ == "__main__":
    main()
