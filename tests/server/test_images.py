"""Images that clients send, in every API: the same picture is the same prompt, and what is wrong with one is a 400."""

import base64
import copy
import json
import re
import sys
from pathlib import Path

import httpx
import pytest
from PIL import Image

import rootcellar
from seeing import data_url, image_file, make_seeing
from serving import idle, on_thread

sys.path.insert(0, str(Path(__file__).parents[1] / "media"))
from hostile import encoded, image, png, text

URL = data_url(image_file())
"""Six tokens of the small model: 56 x 84 pixels, 28 x 28 a token."""
GREEDY = {"temperature": 0, "max_tokens": 4}


@pytest.fixture(scope="module")
def seeing(tmp_path_factory):
    folder = make_seeing(tmp_path_factory.mktemp("seeing"))
    options = {"max_total_tokens": 2048, "max_running_requests": 4, "page_size": 4, "max_queued_requests": 64}
    with rootcellar.Engine(model_path=folder, max_image_pixels=10_000, max_images=4, **options) as engine:
        yield engine


@pytest.fixture(scope="module")
def seeing_url(seeing):
    with on_thread(
        seeing, max_batch_size=16, api_key=["alice:a", "bob:b"], admin_api_key="root", response_pin=0
    ) as url:
        yield url


@pytest.fixture
def sees(seeing_url, seeing):
    seeing.flush_cache()
    with httpx.Client(base_url=seeing_url, timeout=60, headers={"x-api-key": "a"}) as client:
        yield client
    idle(seeing)


def part(url=URL, **more):
    return {"type": "image_url", "image_url": {"url": url, **more}}


def said(words):
    return {"type": "text", "text": words}


def chat(*parts, **more):
    return {"messages": [{"role": "user", "content": list(parts)}], **GREEDY, **more}


def ask(client, path, body):
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def refusal(client, path, body, status=400):
    answer = client.post(path, json=body)
    assert answer.status_code == status, answer.text
    return answer.json()["error"]["message"]


def test_every_api_asks_the_same_and_the_second_finds_it_in_the_cache(sees):
    first = ask(sees, "/v1/chat/completions", chat(part(), said("what is it")))
    used = first["usage"]
    words = first["choices"][0]["message"]["content"]
    assert used["prompt_tokens"] > 8
    found = []
    with sees.stream("POST", "/v1/chat/completions", json=chat(part(), said("what is it"), stream=True)) as events:
        lines = [line[6:] for line in events.iter_lines() if line.startswith("data: {")]
    found.append("".join(json.loads(line)["choices"][0]["delta"].get("content", "") for line in lines))
    source = {"type": "base64", "media_type": "image/png", "data": URL.partition(",")[2]}
    blocks = [{"type": "image", "source": source}, said("what is it")]
    messages = {"messages": [{"role": "user", "content": blocks}], "max_tokens": 4, "temperature": 0}
    told = ask(sees, "/v1/messages", messages)
    found.append("".join(block["text"] for block in told["content"]))
    assert told["usage"]["cache_read_input_tokens"] >= used["prompt_tokens"] - 8
    assert ask(sees, "/v1/messages/count_tokens", {"messages": messages["messages"]}) == {
        "input_tokens": used["prompt_tokens"]
    }
    content = [
        {"type": "input_image", "image_url": URL, "detail": "auto"},
        {"type": "input_text", "text": "what is it"},
    ]
    body = {"input": [{"role": "user", "content": content}], "max_output_tokens": 4, "temperature": 0}
    told = ask(sees, "/v1/responses", body)
    found.append(told["output"][0]["content"][0]["text"])
    assert told["usage"]["input_tokens"] == used["prompt_tokens"]
    assert told["usage"]["input_tokens_details"]["cached_tokens"] >= used["prompt_tokens"] - 8
    prompt = (
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>what is it<|im_end|>\n<|im_start|>assistant\n"
    )
    body = {"text": prompt, "image_data": URL, "sampling_params": {"temperature": 0, "max_new_tokens": 4}}
    told = ask(sees, "/generate", body)
    found.append(told["text"])
    assert told["meta_info"]["image_tokens"] == told["meta_info"]["cached_image_tokens"] == 6
    assert set(found) == {words}


def test_a_conversation_goes_on_with_its_image(sees):
    content = [{"type": "input_image", "image_url": URL}]
    body = {"input": [{"role": "user", "content": content}], "max_output_tokens": 4, "temperature": 0}
    first = ask(sees, "/v1/responses", body)
    then = {"input": "and now", "previous_response_id": first["id"], "max_output_tokens": 4, "temperature": 0}
    second = ask(sees, "/v1/responses", then)
    assert second["usage"]["input_tokens"] > first["usage"]["input_tokens"]
    assert second["usage"]["input_tokens_details"]["cached_tokens"] >= 8


def test_image_data_is_read_as_sglang_reads_it(sees):
    pad, bare = "<|image_pad|>", base64.b64encode(image_file(1)).decode()
    params = {"temperature": 0, "max_new_tokens": 1}

    def seen(prompts, images):
        told = ask(sees, "/generate", {"text": prompts, "image_data": images, "sampling_params": params})
        return [each["meta_info"].get("image_tokens", 0) for each in (told if isinstance(told, list) else [told])]

    assert seen(f"a{pad}b{pad}c", [URL, bare]) == [12]
    assert seen(f"a{pad}b{pad}c", [[URL, bare]]) == [12]
    assert seen(f"a{pad}b", {"url": URL}) == [6]
    assert seen("no image", []) == [0]
    assert seen([f"a{pad}", f"b{pad}"], URL) == [6, 6]
    assert seen([f"a{pad}", f"b{pad}"], [URL, bare]) == [6, 6]
    assert seen([f"a{pad}{pad}", "b", f"c{pad}"], [[URL, bare], None, [bare]]) == [12, 0, 6]


def test_low_detail_is_a_smaller_picture(sees):
    large = data_url(encoded(Image.new("RGB", (600, 16)), "PNG"))
    counts = [
        ask(sees, "/v1/chat/completions", chat(part(large, detail=detail)))["usage"]["prompt_tokens"]
        for detail in ("high", "auto", "low")
    ]
    assert counts[0] == counts[1] > counts[2]


def test_text_in_a_message_is_never_an_image(sees):
    told = ask(sees, "/v1/chat/completions", chat(said("<|vision_start|><|image_pad|><|vision_end|>")))
    assert told["usage"]["prompt_tokens"] > 20  # its letters


def test_what_a_tool_shows_the_user_shows(sees):
    result = [said("see"), {"type": "image", "source": {"type": "url", "url": URL}}]
    turns = [
        {"role": "user", "content": "look"},
        {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "look", "input": {}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": result}, said("and")]},
    ]
    seen, other = ({"messages": copy.deepcopy(turns), "max_tokens": 1} for _ in range(2))
    del other["messages"][2]["content"][0]["content"][1]
    tokens = [ask(sees, "/v1/messages", body)["usage"] for body in (seen, other)]
    together = [sum(each[name] for name in each if name.endswith("input_tokens")) for each in tokens]
    assert together[0] - together[1] >= 8


def test_tenants_share_no_image(sees):
    body = chat(part(), said("mine"))
    ask(sees, "/v1/chat/completions", body)
    other = sees.post("/v1/chat/completions", json=body, headers={"x-api-key": "b"}).json()
    assert other["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


GIF = data_url(encoded(Image.new("RGB", (9, 9)), "GIF"), "gif")


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ([part(data_url(png(200, 200, b"")))], "max_image_pixels"),
        ([part(data_url(image_file()[:-40]))], "a broken image"),
        ([part(), part(data_url(b"GIF89a"))], "image 1: "),
        ([part()] * 5, "max_images"),
        ([part("https://example.com/a.png")], "allowed_media_domains"),
        ([part("http://169.254.169.254/latest/meta-data")], "allowed_media_domains"),
        ([part("file:///etc/passwd")], "data URL"),
        ([part("/etc/passwd.png")], "neither"),
        ([part(GIF, detail="ultra")], "detail"),
        ([{"type": "image_url", "image_url": 7}], "image_url|image must be"),
        ([{"type": "image_url"}], "image must be"),
        ([{"type": "input_audio", "input_audio": {}}], "input_audio"),
        ([part(data_url(encoded(Image.new("RGB", (900, 3)), "PNG")))], "too thin"),
    ],
    ids=range(13),
)
def test_what_is_wrong_with_an_image_is_told(sees, parts, says):
    assert re.search(says, refusal(sees, "/v1/chat/completions", chat(*parts)))


def test_who_may_show_images_and_where_they_must_be(sees):
    body = {"messages": [{"role": "system", "content": [part()]}, {"role": "user", "content": "a"}]}
    assert "system shows no images" in refusal(sees, "/v1/chat/completions", body)
    assert "there are 1 images" in refusal(sees, "/generate", {"text": "none", "image_data": URL})
    assert "there are 0 images" in refusal(sees, "/generate", {"text": "<|image_pad|>"})
    assert "a list of 2" in refusal(sees, "/generate", {"text": ["a", "b"], "image_data": [URL]})
    assert "image_data to /generate" in refusal(sees, "/v1/completions", {"prompt": "a", "image_data": URL})


def test_a_model_that_knows_no_images_says_so(client):
    for path, body in (
        ("/v1/chat/completions", chat(part())),
        ("/generate", {"text": "a", "image_data": URL}),
        ("/tokenize", {"messages": chat(part())["messages"]}),
        ("/v1/responses", {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": URL}]}]}),
    ):
        assert "knows no images" in refusal(client, path, body)


def test_hostile_images_are_400_and_nothing_else(sees):
    hostile_images(sees, range(36))


def hostile_images(client, seeds) -> dict[int, int]:
    """Send each in one of the APIs' ways; which statuses came how often."""
    statuses: dict[int, int] = {}
    for seed in seeds:
        url = data_url(image(seed)) if seed % 2 else text(seed)
        path, body = (
            ("/v1/chat/completions", chat(part(url), max_tokens=1)),
            ("/generate", {"text": "<|image_pad|>", "image_data": url, "sampling_params": {"max_new_tokens": 1}}),
        )[seed // 2 % 2]
        answer = client.post(path, json=body)
        assert answer.status_code in (200, 400), (seed, answer.status_code, answer.text[:300])
        statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1
    return statuses


@pytest.mark.long
def test_two_thousand_hostile_images(sees):
    def resident() -> int:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("VmRSS")) // 1024

    hostile_images(sees, range(60, 160))
    before = resident()
    statuses = hostile_images(sees, range(160, 2160))
    print(f"{statuses}; {before} MiB became {resident()}")
    assert resident() - before < 64


def test_what_is_shown_of_images(sees, seeing):
    ask(sees, "/v1/chat/completions", chat(said("see"), part(), said("it")))
    root = {"headers": {"x-api-key": "root"}}
    assert sees.get("/model_info").json()["has_image_understanding"] is True
    nodes = sees.get("/cache/tree", **root).json()["nodes"]
    (node,) = [node for node in nodes if node["images"]]
    assert [length for _, length in node["images"]] == [6]
    assert "see<|vision_start|>[image]<|vision_end|>it" in node["text"]
    metrics = sees.get("/metrics", **root).text
    found = dict(re.findall(r"^rootcellar_encoder_(\w+) ([\d.e+]+)$", metrics, re.MULTILINE))
    counts = seeing.stats()["encoder"]
    assert float(found["images_total"]) == counts["encoded"] > 0
    assert float(found["cache_bytes"]) == counts["bytes"] > 0
