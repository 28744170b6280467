"""Where weights lie, and in which order of their axes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.layout import Format, Layout

from checkpoints import make_config
from rootcellar.models.config import read_config
from rootcellar.models.places import device_bytes, in_order, lies_at
from rootcellar.runner import Placement
from rootcellar.runner.reserve import weight_bytes

HERE = jax.sharding.SingleDeviceSharding(jax.devices()[0])


@pytest.mark.parametrize(
    ("shape", "elements"),
    [
        ((128, 1, 2880, 720), 128 * 2880 * 768),  # gpt-oss on eight devices
        ((128, 360, 2880), 128 * 360 * 2944),
        ((512, 1, 2048, 128), 512 * 2048 * 128),  # Qwen3-Next on eight
        ((512, 1, 2048, 64), None),  # on sixteen: half of each tile would be empty
        ((16, 1, 5120, 4096), 16 * 5120 * 4096),
    ],
)
def test_matrices_lie_in_order_unless_much_is_left_empty(shape, elements):
    array = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=in_order(shape, HERE))
    said = array.format.layout
    assert (None if said is None else said.major_to_minor) == (elements and tuple(range(len(shape))))
    assert device_bytes(array) == 2 * (elements or array.size)


def test_what_lies_in_another_order_is_turned_and_else_stays_what_it_is():
    value = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    turned = Format(Layout((0, 2, 1)), HERE)
    array = Placement(read_config(make_config("qwen3-moe"))).put(value, turned)
    assert array.format.layout.major_to_minor == (0, 2, 1)
    np.testing.assert_array_equal(array, value)
    assert lies_at(array, turned)
    assert lies_at(array, HERE)
    assert not lies_at(array, Format(Layout((0, 1, 2)), HERE))


def test_experts_on_a_tpu_count_with_the_edges_of_tiles(monkeypatch):
    sizes = {"hidden_size": 136, "moe_intermediate_size": 120}  # 136 by 256, and 120 by 256: more than an eighth
    placement = Placement(read_config(make_config("qwen3-moe", **sizes)))
    elsewhere = weight_bytes(placement, jnp.float32)
    monkeypatch.setattr(Placement, "platform", "tpu")
    said = [leaf for leaf in jax.tree.leaves(placement.abstract(jnp.float32)) if leaf.format.layout is not None]
    assert {leaf.shape[1:] for leaf in said} == {(1, 136, 240)}
    edges = sum(leaf.size // 240 * 16 * 4 for leaf in said)
    assert weight_bytes(placement, jnp.float32) == elsewhere + edges
