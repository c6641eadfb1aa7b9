import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bkd_fast.inference.tiling import TileBlender


@settings(deadline=None)  # it measures the load of the machine
@given(
    whole=st.tuples(st.integers(1, 60), st.integers(1, 60)), part=st.tuples(st.integers(1, 30), st.integers(1, 30)),
    overlap=st.integers(0, 29),
)  # fmt: skip
def test_a_map_that_is_cut_into_tiles_is_blended_into_itself(whole, part, overlap):
    tile = (min(part[0], whole[0]), min(part[1], whole[1]))
    overlap = min(overlap, min(tile) - 1)
    expected = torch.rand(whole)
    mosaic = TileBlender(whole, tile, overlap)
    places = mosaic.places
    for place in places:
        top, left = place
        assert 0 <= top <= whole[0] - tile[0]
        assert 0 <= left <= whole[1] - tile[1]
        mosaic.add(place, expected[top : top + tile[0], left : left + tile[1]])
    torch.testing.assert_close(mosaic.blended(), expected)
    for axis, length in enumerate(tile):
        starts = sorted({place[axis] for place in places})
        assert all(after - before <= length - overlap for before, after in zip(starts, starts[1:], strict=False))
    assert len(set(places)) == len(places)


def test_a_tile_counts_the_less_the_nearer_its_edge_is():
    mosaic = TileBlender((1, 12), (1, 8), 3)
    assert [place.left for place in mosaic.places] == [0, 4]
    for value, place in enumerate(mosaic.places):
        mosaic.add(place, torch.full((1, 8), float(value)))
    found = mosaic.blended()[0]
    assert found[:4].tolist() == [0] * 4
    assert found[8:].tolist() == pytest.approx([1] * 4)
    assert (found[4:8].diff() > 0).all()
