"""Weights over a wire: whole versions alone, whoever is at the other end and whatever becomes of it."""

import base64
import json
import subprocess
import sys
from pathlib import Path

import httpx
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

import rootcellar
from rootcellar import demo
from rootcellar.errors import EngineError
from rootcellar.integrations.pushing import WeightPusher
from rootcellar.models.config import load_config
from rootcellar.models.loader import load_params, tensors_from_params
from rootcellar.transfer.wires.arrays import Arrays
from serving import idle, on_thread

ROOT = Path(__file__).parents[2]
ASK = {"text": "What is a KV cache?", "sampling_params": {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}}


@pytest.fixture(scope="module")
def client():
    with (
        rootcellar.Engine(model_path="demo", dtype="float32", max_total_tokens=1024, max_running_requests=4) as engine,
        on_thread(engine) as url,
        httpx.Client(base_url=url, timeout=60) as client,
    ):
        client.engine = engine
        yield client
        idle(engine)


@pytest.fixture(scope="module")
def tensors():
    cfg = load_config(demo.path())
    params = load_params(demo.path(), cfg, "float32")
    return {name: np.array(array) for name, array in tensors_from_params(cfg, params)}


def post(client, path, status=200, **body):
    response = client.post(path, json=body)
    assert response.status_code == status, response.text
    return response.json()


def said(client):
    answer = post(client, "/generate", **ASK)
    return answer["output_ids"], answer["meta_info"]["weight_version"]


def packed(tensors):
    return [base64.b64encode(safetensors.numpy.save(tensors)).decode()]


def halves(tensors):
    names = list(tensors)
    return [{name: tensors[name] for name in part} for part in (names[::2], names[1::2])]


def send(client, tensors, version, status=200, **body):
    body = {
        "serialized_named_tensors": packed(tensors),
        "load_format": "safetensors",
        "weight_version": version,
        **body,
    }
    return post(client, "/update_weights_from_tensor", status, **body)


def test_a_version_is_used_when_all_of_it_is_there(client, tensors):
    expected, _ = said(client)
    other = {name: tensor * 1.5 for name, tensor in tensors.items()}
    first, second = halves(other)
    answer = send(client, first, "b", flush_cache=False)
    assert (answer["missing"], answer["weight_version"]) == (len(second), "0")
    assert said(client) == (expected, "0")
    send(client, halves(tensors)[0], "c")  # begins anew: no half of b is in it
    assert send(client, second, "b")["missing"] == len(first)
    answer = send(client, first, "b", on_weight_update="recompute")
    assert (answer["missing"], answer["weight_version"]) == (0, "b")
    assert "layers.0.qkv" in answer["copied"]
    assert answer["received_bytes"] >= sum(tensor.nbytes for tensor in first.values())
    assert said(client)[0] != expected
    narrow = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in tensors.items()}
    parts = packed(halves(narrow)[0]) + packed(halves(narrow)[1])
    assert send(client, {}, None, serialized_named_tensors=parts)["weight_version"] == "b+1"
    send(client, tensors, "0")
    assert said(client) == (expected, "0")


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"load_format": None}, "safetensors"),
        ({"load_format": "flattened_bucket"}, "pickle"),
        ({"serialized_named_tensors": ["gASVCg=="]}, "no safetensors"),
        ({"serialized_named_tensors": ["%"]}, "base64"),
        ({"serialized_named_tensors": packed({"strange": np.zeros(3, np.float32)})}, "strange"),
        ({"serialized_named_tensors": packed({"model.norm.weight": np.zeros(3, np.float32)})}, "shape"),
        ({"serialized_named_tensors": packed({"model.norm.weight": np.zeros(192, np.int32)})}, "int32"),
        ({"manifest": {}}, "manifest"),
    ],
)
def test_what_is_no_part_of_the_model_is_refused_and_changes_nothing(client, tensors, change, part):
    expected = said(client)
    assert part in send(client, tensors, "x", 400, **change)["error"]["message"]
    assert said(client) == expected


def test_a_trainer_in_another_process_pushes_from_its_devices(client, tensors):
    """The small form of ``benchmarks/weight_updates.py``, whose server is another process as well."""
    program = f"""
import sys
import jax.numpy as jnp
from rootcellar import demo
from rootcellar.integrations.pushing import WeightPusher
from rootcellar.models.config import load_config
from rootcellar.models.loader import load_params, tensors_from_params
cfg = load_config(demo.path())
tensors = {{n: jnp.array(a) for n, a in tensors_from_params(cfg, load_params(demo.path(), cfg, "float32"))}}
with WeightPusher({str(client.base_url)!r}, part_bytes=1 << 20) as pusher:
    for version, factor in (("b", 1.5), ("c", 1.0)):
        answer = pusher.push({{n: a * factor for n, a in tensors.items()}}, version)
        print(answer["weight_version"], answer["received_bytes"], flush=True)
        sys.stdin.readline()
"""
    expected, _ = said(client)
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as trainer:
        nbytes = sum(tensor.nbytes for tensor in tensors.values())
        assert trainer.stdout.readline().split() == ["b", str(nbytes)]
        other, version = said(client)
        assert (other != expected, version) == (True, "b")
        trainer.stdin.write("\n")
        trainer.stdin.flush()
        assert trainer.stdout.readline().split() == ["c", str(nbytes)]
        assert said(client) == (expected, "c")
        trainer.stdin.write("\n")
    assert trainer.returncode == 0


def test_a_trainer_that_is_not_there_or_gives_other_things_harms_nothing(client, tensors):
    expected = said(client)
    group = {"group_name": "g", "backend": "jax", "master_address": "127.0.0.1"}
    assert (
        "torch"
        in post(client, "/init_weights_update_group", 400, **{**group, "backend": "nccl"}, master_port=1)["error"][
            "message"
        ]
    )
    assert "nobody answers" in json.dumps(post(client, "/init_weights_update_group", 400, **group, master_port=1))
    assert "no group" in json.dumps(post(client, "/destroy_weights_update_group", 400, group_name="g"))
    arrays = Arrays("127.0.0.1")
    name, whole = "model.norm.weight", tensors["model.norm.weight"]
    asked = {"group_name": "g", "names": [name], "dtypes": ["torch.float32"], "shapes": [list(whole.shape)]}
    post(client, "/init_weights_update_group", **group, master_port=arrays.port)
    for change, part in (
        ({"names": ["strange"]}, "strange"),
        ({"dtypes": ["float31"]}, "float31"),
        ({"shapes": [[7]]}, "shape"),
        ({"shapes": []}, "one each"),
        ({"group_name": "h"}, "no group"),
    ):
        refused = post(client, "/update_weights_from_distributed", 400, **{**asked, **change}, number=1)
        assert part in refused["error"]["message"]
    answer = post(client, "/update_weights_from_distributed", **asked, number=arrays.offer([jnp.array(whole)]))
    assert answer["missing"] == len(tensors) - 1
    late = post(client, "/update_weights_from_distributed", 503, **asked, number=2**40, timeout=0.2)
    assert "within 0.2 seconds" in late["error"]["message"]
    again = post(client, "/update_weights_from_distributed", 503, **asked, number=1)
    assert "open the group anew" in again["error"]["message"]
    post(client, "/destroy_weights_update_group", group_name="g")
    assert said(client) == expected


def test_a_pusher_says_what_is_missing(client, tensors):
    some = {name: jnp.array(tensor) for name, tensor in halves(tensors)[0].items()}
    with (
        WeightPusher(str(client.base_url), group_name="p") as pusher,
        pytest.raises(EngineError, match=f"{len(tensors) - len(some)} of the model's tensors"),
    ):
        pusher.push(some, "x")
