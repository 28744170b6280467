"""Requests explain what they computed: beside the answer, later by id, and summed up; to whoever owns them."""

import json

import pytest

SYSTEM = "You look after the shelves of a root cellar and answer in a few short and truthful sentences, whoever asks. "
REST = (
    "Apples lie to the left, potatoes to the right, and the carrots are in sand at the very end of the longest shelf. "
)


def test_a_date_in_front_is_found_beside_the_answer_later_and_in_the_report(client):
    for day in ("Monday the 3rd", "Tuesday the 4th"):
        text = f"{SYSTEM}Today is {day}. {REST * 2}"
        body = {"text": text, "rid": day[:6], "cache_salt": "explaining", "sampling_params": {"max_new_tokens": 2}}
        answer = client.post("/generate", json={**body, "explain": True}).json()
    told = answer["meta_info"]["explanation"]
    assert told["cause"] == "changing_value"
    assert told["before"].endswith("Today is")
    assert (told["got"].split()[0], told["instead"].split()[0]) == ("Tuesday", "Monday")
    assert told["than"] == "Monday"
    assert told["cached_tokens"] == answer["meta_info"]["cached_tokens"]
    assert told["price_tokens"] > 32
    assert told["price_seconds"] > 0
    assert client.get("/cache/explain/Tuesda").json() == told
    report = client.get("/cache/report", params={"most": 100}).json()
    mine = [habit for habit in report["causes"] if habit["example"]["rid"] == "Tuesda"]
    assert [habit["cause"] for habit in mine] == ["changing_value"]
    assert report["price_tokens"] >= mine[0]["price_tokens"]
    assert "end" in mine[0]["remedy"]


def test_what_is_not_remembered_is_said_to_be_so(client):
    answer = client.get("/cache/explain/nobody")
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "no_such_request"


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_openais_routes_explain_too(client, path, stream):
    text = SYSTEM + path
    asked = {"prompt": text} if path == "/v1/completions" else {"messages": [{"role": "user", "content": text}]}
    body = {**asked, "max_tokens": 2, "stream": stream}
    client.post(path, json={**body, "stream": False})
    answer = client.post(path, json=body, headers={"X-Cache-Explain": "1"})
    events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
    told = (events[-1] if stream else answer.json())["sglext"]["explanations"]
    assert [each["cause"] in ("nothing", "page_rounding") for each in told] == [True]
    assert told[0]["price_tokens"] < 16
    assert 0 < told[0]["prompt_tokens"] - told[0]["cached_tokens"] <= 16


def test_logprobs_of_the_prompt_are_a_cause(client):
    body = {"text": SYSTEM * 2, "sampling_params": {"max_new_tokens": 1}, "cache_salt": "logprobs"}
    client.post("/generate", json=body)
    wanted = {"return_logprob": True, "logprob_start_len": 5, "explain": True}
    told = client.post("/generate", json={**body, **wanted}).json()["meta_info"]["explanation"]
    assert told["cause"] == "logprobs"
    assert told["price_tokens"] > 0
