"""The static sizes that prompts are padded to."""

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.model.families import family_config
from tests.tiny import tiny_config
from vr_jax.data import native
from vr_jax.inference import Buckets
from vr_jax.model.config import ImageConfig

RELEASED = ImageConfig(tile_size=112, aspect_ratio="native", unpad=False)


def test_a_model_of_grids_has_exact_tiles_up_to_ten():
    assert Buckets.of(tiny_config()) == Buckets()
    assert Buckets().tiles[:10] == tuple(range(1, 11))


@settings(deadline=None)
@given(st.integers(1, 5000), st.floats(1, 199), st.booleans())
def test_buckets_hold_any_image_of_the_released_limits(shorter, ratio, tall):
    """Also the longest ones, and few are compiled: little of a bucket is unused."""
    buckets = Buckets.of(family_config("qwen2_5_vl"))
    longer = int(shorter * ratio)
    layout = native.layout((shorter, longer) if tall else (longer, shorter), 14, 2, RELEASED)
    tokens, tiles = buckets.fit(len(layout.cell), layout.tiles)
    assert tiles <= max(8, 1.5 * layout.tiles)
    assert tokens <= max(64, 1.5 * len(layout.cell))


def test_steps_between_buckets_are_bounded():
    sizes = Buckets.of(family_config("qwen2_5_vl")).tiles
    assert all(high <= 2 * low if low < 8 else high <= 1.5 * low for low, high in itertools.pairwise(sizes))
