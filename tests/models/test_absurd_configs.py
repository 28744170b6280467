"""Configs and folders that nobody should trust: absurd fields, names that lead elsewhere, pointers instead of files.

Whatever a field holds, reading ends soon, with a model that can be declared or with a ``ModelError``.
"""

import json
import math
import shutil
import tracemalloc
from collections.abc import Mapping

import jax
import pytest

from checkpoints import FAMILIES, golden, golden_names, make_checkpoint, make_config
from rootcellar.errors import ConfigError, ModelError
from rootcellar.models.config import load_config, read_config
from rootcellar.models.families import family_of
from rootcellar.models.loader import check_weights, load_params
from rootcellar.models.params import declare
from rootcellar.plan.fields import FIELDS, Object
from rootcellar.plan.layers import read_architecture
from rootcellar.plan.weights import weight_bytes
from rootcellar.text import Tokenizer

ABSURD = [
    *(None, True, 0, 1, 3, -1, 10**8, 2**31, 2**63, 10**400, 0.5, 2.0, 1e308, math.nan, math.inf, -math.inf),
    *("", "x", "1", "full_attention", [], [1], ["x"], [None], [[]], [10**9], ["full_attention"] * 10**5),
    *({}, {"factor": "x"}, {"type": 1}, {"full_attention": 1}, {"quant_method": 3}),
]


@pytest.fixture(scope="module")
def configs():
    """The config of every golden checkpoint."""
    return {name: make_config(golden(name).family, **golden(name).overrides) for name in golden_names()}


def mutations(config):
    for name, field in FIELDS.items():
        for value in ABSURD:
            yield name, {**config, name: value}
            yield name, {**config, "text_config": {name: value}}
        if isinstance(field, Object) and isinstance(config.get(name), dict):
            for inner in field.fields:
                for value in ABSURD:
                    yield f"{name}.{inner}", {**config, name: {**config[name], inner: value}}
    for value in ABSURD:
        yield "text_config", {**config, "text_config": value}


@pytest.mark.parametrize("family", FAMILIES)
def test_an_absurd_field_is_refused_or_makes_a_model(family, configs):
    config = next(config for name, config in configs.items() if golden(name).family == family)
    seen = {"refused": 0, "read": 0}
    tracemalloc.start()
    for name, mutated in mutations(config):
        try:
            model = read_config(mutated)
        except ModelError:
            seen["refused"] += 1
        else:
            seen["read"] += 1
            assert model.num_layers <= 512, name
            assert 0 < model.context_length <= 2**27, name
    assert tracemalloc.get_traced_memory()[1] < 2**26
    tracemalloc.stop()
    assert min(seen.values()) > 100


@pytest.mark.parametrize("family", ["llama3", "deepseek3", "qwen3-next", "gemma3"])
def test_an_absurd_field_never_loads_other_weights(family, tmp_path):
    """A model that is read is declared as the checkpoint has it, or its weights are refused."""
    make_checkpoint(family, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    whole = jax.tree.leaves(declare(read_config(config)))
    for name in config:
        for value in (1, 3, 7, 512, 1024, 2**20, 2**24):
            try:
                model = read_config({**config, name: value})
                specs = jax.tree.leaves(declare(model))
                check_weights(tmp_path, model)
            except ModelError:
                continue
            shapes = {source: spec.shape for spec in whole for source in spec.sources}
            assert all(shapes[source] == spec.shape for spec in specs for source in spec.sources), (name, value)


def test_a_config_that_is_no_object():
    for raw in ([], "x", 3, None):
        with pytest.raises(ModelError, match="a config must be an object"):
            read_architecture(raw)


def test_the_planner_refuses_by_name_too(configs):
    config = configs["qwen3-next"]
    for name, mutated in mutations(config):
        try:
            assert weight_bytes(read_architecture(mutated)) >= 0, name
        except (ModelError, ConfigError):
            continue


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_hidden_layers": 10**8}, "num_hidden_layers must be .* at least 1 and at most 512, not 100"),
        ({"hidden_size": 2**63}, "hidden_size must be"),
        ({"vocab_size": 1e3}, r"vocab_size must be .*, not 1000\.0"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps must be a number"),
        ({"rope_theta": "1e4"}, "rope_theta must be a number above 1"),
        ({"rope_scaling": "linear"}, "rope_scaling must be an object, not 'linear'"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "rope_scaling.factor must be a number"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 1e6}}, "a context of 2,048,000,000"),
        ({"text_config": "x"}, "text_config must be an object, not 'x'"),
        ({"text_config": {"head_dim": -1}}, "text_config.head_dim must be"),
        ({"quantization_config": "fp8"}, "quantization_config must be an object, not 'fp8'"),
        ({"architectures": "LlamaForCausalLM"}, "architectures must be a list"),
        ({"layer_types": ["full_attention"] * 10**6}, "layer_types must be a list of at most 512 entries"),
        ({"eos_token_id": "</s>"}, "eos_token_id must be"),
        ({"head_dim": 7}, "head_dim=7: rotary embeddings turn pairs"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings must be true or false"),
    ],
)  # fmt: skip
def test_refusals_name_the_field_and_what_it_may_be(overrides, message):
    with pytest.raises(ModelError, match=message):
        read_config(make_config("llama3", **overrides))


class Watched(Mapping):
    """A config that remembers which of its fields were read."""

    def __init__(self, fields, read):
        self.fields, self.read = fields, read

    def __getitem__(self, name):
        self.read.add(name)
        return self.fields[name]

    def __contains__(self, name):
        self.read.add(name)
        return name in self.fields

    def get(self, name, default=None):
        self.read.add(name)
        return self.fields.get(name, default)

    def __iter__(self):
        return iter(self.fields)

    def __len__(self):
        return len(self.fields)


def test_whatever_a_family_reads_has_limits(configs):
    read = set()
    for config in configs.values():
        family = family_of(config)
        watched = Watched({**family.defaults, **config}, read)
        fields = family.read(watched)
        assert fields["layers"]
        read_architecture(watched)
    assert read - {"text_config", "pad_token_id"} <= set(FIELDS)
    assert len(read) > 60


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def sharded(tmp_path):
    folder = make_checkpoint("qwen2", tmp_path / "model", shards=2, tokenizer=True, hidden_size=64, head_dim=16)
    return folder, load_config(folder)


def load_all(folder, model):
    load_config(folder)
    load_params(folder, model, "float32")
    Tokenizer(folder)


def rename_in_index(folder, old, new):
    path = folder / "model.safetensors.index.json"
    path.write_text(path.read_text().replace(json.dumps(old), json.dumps(str(new))))


@pytest.mark.parametrize("place", ["../x.safetensors", "/{}", "a/../../x.safetensors", "", "x\0y", "..\\x.safetensors"])
def test_an_index_names_files_inside_its_folder_only(sharded, place):
    folder, model = sharded
    shard = sorted(path.name for path in folder.glob("model-*"))[0]
    outside = folder.parent / "x.safetensors"
    shutil.move(folder / shard, outside)
    rename_in_index(folder, shard, place.format(str(outside)[1:]))
    with pytest.raises(ModelError, match="only files inside the folder are read"):
        load_params(folder, model, "float32")


def test_a_shard_in_a_folder_below_is_read(sharded):
    folder, model = sharded
    shard = sorted(path.name for path in folder.glob("model-*"))[0]
    (folder / "parts").mkdir()
    shutil.move(folder / shard, folder / "parts" / shard)
    rename_in_index(folder, shard, f"parts/{shard}")
    load_params(folder, model, "float32")


@pytest.mark.parametrize(
    "content", ['{"weight_map": []}', '{"weight_map": {"a": 3}}', '{"weight_map": {}}', "{}", "[]", "["]
)
def test_an_index_that_is_none(sharded, content):
    folder, model = sharded
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ModelError, match=r"index\.json"):
        load_params(folder, model, "float32")


def test_links_lead_into_the_folder_or_into_the_blobs_of_a_hub_cache(sharded, tmp_path):
    folder, model = sharded
    snapshot, blobs = tmp_path / "hub" / "snapshots" / "abc", tmp_path / "hub" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in folder.iterdir():
        shutil.copy(path, blobs / f"{path.name}-hash")
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}-hash")
    assert load_config(snapshot) == model
    load_params(snapshot, model, "float32")
    Tokenizer(snapshot)
    link = tmp_path / "revision"
    link.symlink_to(snapshot)  # the folder itself may be a link
    load_params(link, model, "float32")


@pytest.mark.parametrize(
    "name", ["model-00001-of-00002.safetensors", "config.json", "chat_template.jinja", "tokenizer.json"]
)
def test_a_link_out_of_the_folder_is_refused(sharded, name, tmp_path):
    folder, model = sharded
    secret = tmp_path / "secret"
    if (folder / name).exists():
        shutil.move(folder / name, secret)
    else:
        secret.write_text("private")
    (folder / name).symlink_to(secret)
    with pytest.raises(ModelError, match=f"{name} is a link to .*secret, outside of the folder"):
        load_all(folder, model)


@pytest.mark.parametrize(
    "name", ["model-00001-of-00002.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"]
)
def test_a_pointer_of_git_lfs_says_what_to_run(sharded, name):
    folder, model = sharded
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ModelError, match=f"{name} is a Git LFS pointer.*git lfs pull"):
        load_all(folder, model)


def test_json_that_is_too_deep_and_text_that_is_no_text(sharded):
    folder, _ = sharded
    (folder / "generation_config.json").write_text("[" * 10**5)
    with pytest.raises(ModelError, match="is not JSON"):
        load_config(folder)
    (folder / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(ModelError, match="is not UTF-8"):
        Tokenizer(folder)
