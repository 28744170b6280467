"""Bad input gives a clear error, and the engine goes on."""

import pytest
from idle import check_idle

import rootcellar
from checkpoints import make_checkpoint
from rootcellar.errors import ConfigError, ModelError, QueueFull, RequestError, RequestTooLarge

GREEDY = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True}

BAD_REQUESTS = [
    ({"prompt": ""}, RequestError, "empty"),
    ({"input_ids": []}, RequestError, "empty"),
    ({"input_ids": [[1], []]}, RequestError, "prompt 1.*empty"),
    ({"prompt": []}, RequestError, "at least one"),
    ({}, RequestError, "either prompt"),
    ({"prompt": "a", "input_ids": [1]}, RequestError, "not both"),
    ({"input_ids": [1, 512]}, RequestError, "token 1 is 512, out of range: .*0 to 511"),
    ({"input_ids": [-1]}, RequestError, "out of range"),
    ({"input_ids": [1.5]}, RequestError, "no integer|list"),
    ({"input_ids": ["a"]}, RequestError, "list"),
    ({"input_ids": [1] * 5000}, RequestTooLarge, "context_length"),
    ({"input_ids": [1] * 1500}, RequestTooLarge, "max_total_tokens"),
    ({"input_ids": [1] * 1000, "sampling_params": {"max_new_tokens": 100}}, RequestTooLarge, "max_total_tokens"),
    ({"input_ids": [1], "sampling_params": {"max_new_tokens": 4000}}, RequestTooLarge, "context"),
    ({"prompt": "a", "sampling_params": {"temperature": -1}}, RequestError, "temperature"),
    ({"prompt": "a", "sampling_params": {"temperatur": 1}}, RequestError, "temperature"),
    ({"prompt": "a", "sampling_params": {"top_p": float("nan")}}, RequestError, "top_p"),
    ({"prompt": "a", "sampling_params": [{}, {}]}, RequestError, "sampling_params"),
    ({"prompt": "a", "sampling_params": {"stop_token_ids": [512]}}, RequestError, "stop_token_ids"),
    ({"prompt": ["a", "b"], "rid": ["x", "x"]}, RequestError, "'x' is in use"),
    ({"prompt": "a", "return_logprob": True, "logprob_start_len": 9}, RequestError, "beyond the prompt"),
    ({"prompt": "a", "top_logprobs_num": -1}, RequestError, "top_logprobs_num"),
    ({"prompt": "a\ud800"}, RequestError, "valid text"),
    ({"prompt": "a", "priority": 2**80}, RequestError, "priority=.* below 2147483648"),
    ({"prompt": 3}, RequestError, "must be a text"),
    ({"input_ids": 3}, RequestError, "must be a list of token ids"),
    ({"input_ids": [2**70]}, RequestError, "out of range"),
    ({"prompt": "a", "sampling_params": 3}, RequestError, "sampling_params must be one"),
    ({"prompt": "a", "sampling_params": [3]}, RequestError, "sampling_params must be one"),
    ({"prompt": ["a"], "rid": [3]}, RequestError, "rid must be a string"),
]


@pytest.mark.parametrize(("call", "error", "says"), BAD_REQUESTS)
def test_bad_requests(engine, call, error, says):
    with pytest.raises(error, match=says):
        engine.generate(**call)
    assert len(engine.generate(prompt="hello", sampling_params=GREEDY)["output_ids"]) == 12


def test_what_is_of_another_type_is_refused_by_every_verb(engine):
    calls = [
        (lambda: engine.encode(3), RequestError, "must be a text, not 3"),
        (lambda: engine.encode(None), RequestError, "must be a text"),
        (lambda: engine.encode("\ud800"), RequestError, "valid text"),
        (lambda: engine.chat_prompt(3), RequestError, "messages must be a list of objects"),
        (lambda: engine.chat_prompt("hello"), RequestError, "messages must be a list of objects"),
        (lambda: engine.chat_ids([3]), RequestError, "messages must be a list of objects"),
        (lambda: engine.prefixes.explain(3), RequestError, "input_ids must be a list"),
        (lambda: engine.prefixes.pin("ab", 1.0), RequestError, "input_ids must be a list"),
        (lambda: engine.release_memory_occupation(3), ConfigError, "tags must be one or a list"),
        (lambda: engine.update_weights(3), ModelError, "params do not fit"),
        (lambda: engine.update_weights_from_disk(3), ConfigError, "model_path must be the path of a folder"),
    ]
    for call, error, says in calls:
        with pytest.raises(error, match=says):
            call()


def test_bad_settings(tiny_folder, tmp_path):
    with pytest.raises(ConfigError, match="page_size"):
        rootcellar.Engine(model_path=tiny_folder, pagesize=16)
    with pytest.raises(ConfigError, match="max_position_embeddings"):
        rootcellar.Engine(model_path=tiny_folder, context_length=10**6)
    with pytest.raises(ModelError, match="no model folder"):
        rootcellar.Engine(model_path=tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="max_total_tokens"):
        rootcellar.Engine(model_path=tiny_folder, max_total_tokens=8, page_size=16)
    folder = make_checkpoint("qwen2", tmp_path / "strange", architectures=["StrangeForCausalLM"])
    with pytest.raises(ModelError, match=r"StrangeForCausalLM.*Qwen2ForCausalLM"):
        rootcellar.Engine(model_path=folder, skip_tokenizer_init=True)


def test_a_missing_tensor_is_named(tmp_path):
    from safetensors.numpy import load_file, save_file

    folder = make_checkpoint("qwen2", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        rootcellar.Engine(model_path=folder, skip_tokenizer_init=True)


def test_prompts_without_a_tokenizer(tmp_path):
    folder = make_checkpoint("qwen2", tmp_path)
    with pytest.raises(ModelError, match="skip_tokenizer_init"):
        rootcellar.Engine(model_path=folder)
    with rootcellar.Engine(model_path=folder, skip_tokenizer_init=True, max_total_tokens=256) as engine:
        with pytest.raises(RequestError, match="input_ids"):
            engine.generate(prompt="hello")
        with pytest.raises(RequestError, match="stop_token_ids"):
            engine.generate(input_ids=[1], sampling_params={"stop": "x"})
        with pytest.raises(RequestError, match="skip_tokenizer_init"):
            engine.chat_prompt([{"role": "user", "content": "hi"}])


def test_the_queue_has_a_limit(tiny_folder):
    with rootcellar.Engine(
        model_path=tiny_folder, max_total_tokens=256, max_running_requests=2, max_queued_requests=1
    ) as engine:
        with pytest.raises(RequestTooLarge, match="max_queued_requests"):
            engine.generate(input_ids=[[1], [2], [3], [4]], sampling_params=GREEDY)
        engine.pause_generation("in_place")
        waiting = engine.generate(input_ids=[[1], [2], [3]], sampling_params=GREEDY, stream=True)
        with pytest.raises(QueueFull, match="1 more, and there is room for 0"):
            engine.generate(input_ids=[4], sampling_params=GREEDY)
        engine.continue_generation()
        assert sum(r["meta_info"]["finish_reason"] is not None for r in waiting) == 3
        check_idle(engine)
