"""The routes of the store behind host memory, by SGLang's names."""

import httpx
import pytest

import rootcellar
from serving import on_thread

ROUTE = "/hicache/storage-backend"


@pytest.fixture(scope="module")
def tiered():
    with rootcellar.Engine(
        model_path="demo", max_total_tokens=1024, max_running_requests=2, enable_hierarchical_cache=True
    ) as engine:
        yield engine


@pytest.fixture
def client(tiered):
    with (
        on_thread(tiered, admin_api_key="root", api_key=["user"]) as url,
        httpx.Client(base_url=url, timeout=60, headers={"Authorization": "Bearer root"}) as client,
    ):
        yield client
    tiered.detach_storage()
    tiered.flush_cache()
    tiered.check()


def body(tmp_path, **more):
    extra = {"path": str(tmp_path / "pages"), "min_free_space": 0, "max_size": "16MiB", "prefetch_threshold": 16}
    return {"hicache_storage_backend": "file", "hicache_storage_backend_extra_config_json": extra, **more}


def ask(client):
    answer = client.post(
        "/generate",
        json={"input_ids": list(range(5, 105)), "sampling_params": {"max_new_tokens": 2, "temperature": 0}},
    ).json()
    return answer["output_ids"], answer["meta_info"]["cached_tokens_details"]


def test_a_store_is_attached_used_cleared_and_detached(client, tiered, tmp_path):
    assert client.get(ROUTE).json()["hicache_storage_backend"] is None
    assert client.post(f"{ROUTE}/clear").status_code == 400
    attached = client.put(ROUTE, json=body(tmp_path, hicache_storage_prefetch_policy="wait_complete")).json()
    assert attached["hicache_storage_prefetch_policy"] == "wait_complete"
    assert client.get(ROUTE).json().items() <= attached.items()
    tokens, _ = ask(client)
    tiered._loop.call(tiered._loop.machine.life.settle)
    tiered.flush_cache()
    assert ask(client) == (tokens, {"device": 0, "host": 0, "storage": 96})
    again = client.put(ROUTE, json=body(tmp_path))  # in place of itself
    assert again.json()["hicache_storage_prefetch_policy"] == "timeout"
    metrics = client.get("/metrics").text
    assert 'rootcellar_copied_bytes_total{lane="storage-host"}' in metrics
    assert client.get("/server_info").json()["internal_states"]
    assert client.post(f"{ROUTE}/clear").json()["pages"] >= 6
    assert client.delete(ROUTE).json()["message"] == "Store detached."
    assert client.delete(ROUTE).json()["message"] == "There was no store."
    tiered.flush_cache()
    assert ask(client) == (tokens, {"device": 0, "host": 0, "storage": 0})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hicache_storage_backend": "disk"}, "file"),
        ({"hicache_storage_backend_extra_config_json": {}}, "path"),
        ({"hicache_storage_backend_extra_config_json": "{"}, "json"),
        ({"hicache_storage_backend": "dynamic"}, "when the server is started"),
        (
            {
                "hicache_storage_backend": "chain",
                "hicache_storage_backend_extra_config_json": {"stores": [{"backend": "dynamic"}]},
            },
            "when the server is started",
        ),
        ({"hicache_storage_prefetch_policy": "never"}, "best_effort"),
        ({"hicache_write_policy": "write_back"}, "write_through"),
        ({"colour": 1}, "colour"),
    ],
    ids=["backend", "path", "json", "code", "code in a chain", "policy", "write policy", "unknown"],
)
def test_what_cannot_be_attached_is_refused_with_the_reason(client, tmp_path, change, said):
    refused = client.put(ROUTE, json=body(tmp_path, **change))
    assert refused.status_code == 400
    assert said in refused.json()["error"]["message"]
    assert client.get(ROUTE).json()["hicache_storage_backend"] is None


@pytest.mark.parametrize(("method", "path"), [("GET", ""), ("PUT", ""), ("DELETE", ""), ("POST", "/clear")])
def test_only_the_admin_may(client, method, path):
    refused = client.request(method, ROUTE + path, headers={"Authorization": "Bearer user"})
    assert refused.status_code in (401, 403)


def test_without_host_memory_there_is_no_place_for_a_store(engine, client, tmp_path):
    with on_thread(engine) as url:
        refused = httpx.put(url + ROUTE, json=body(tmp_path), timeout=60)
    assert refused.status_code == 400
    assert "enable_hierarchical_cache" in refused.json()["error"]["message"]
