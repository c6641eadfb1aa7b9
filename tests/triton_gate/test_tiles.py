"""Which tiles of the convolution Triton tries, and how many parts its depth has. Nothing is compiled."""

import pytest
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from tools.triton_gate import kernels as triton_kernels

reason = triton_kernels.why_not()
pytestmark = pytest.mark.skipif(reason is not None, reason=str(reason))
H100 = 132  # multiprocessors
# Channels, which are as many outputs, and side: programs of 64 pixels and up to 128 outputs, and parts. The products
# are the CUDA kernels' blocks on the same device (docs/speed.md).
LEVELS = {
    (256, 64): (128, 3), (512, 32): (64, 5), (1024, 16): (32, 9),
    (64, 64): (64, 4), (128, 32): (16, 9), (256, 16): (8, 18),
}  # fmt: skip


@pytest.fixture
def conv():
    from bkd_fast.ops.deform_conv import triton

    return triton


@pytest.mark.parametrize(("channels", "side"), LEVELS)
def test_a_convolution_of_one_image_fills_the_device_as_far_as_its_depth_goes(channels, side, conv):
    programs, parts = LEVELS[channels, side]
    assert programs == side * side // 64 * -(-channels // 128)
    assert conv.parts_of_depth(side * side, 1, channels, 9 * channels, H100) == parts
    assert programs * parts >= 2 * H100 or 9 * channels // (parts + 1) < 128


def test_many_pixels_groups_or_an_unknown_number_leave_the_depth_whole(conv):
    assert conv.parts_of_depth(64 * 264, 1, 64, 2304, H100) == 1
    assert conv.parts_of_depth(64 * 263, 1, 64, 2304, H100) == 2
    assert conv.parts_of_depth(64, 264, 64, 576, H100) == 1
    assert conv.parts_of_depth(64, 1, 64, 255, H100) == 1
    assert conv.parts_of_depth(ShapeEnv().create_unbacked_symint(), 1, 64, 2304, H100) == 1


@pytest.mark.parametrize("kind", ["half", "tf32", "ieee"])
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("outputs", [8, 64, 65, 128, 129, 512])
def test_tuning_tries_the_tiles_that_a_shape_can_fill(outputs, split, kind, conv):
    tuner = conv.KERNEL(kind)
    tuner.nargs = {"group_outputs": outputs}
    tiles = {(one.kwargs["BLOCK_M"], one.kwargs["BLOCK_N"]) for one in tuner.prune_configs({"SPLIT": split})}
    wanted = {(64, 64)}
    if outputs > 64:
        wanted |= {(64, 128)} if split else {(64, 128), (128, 128)}
    if outputs > 128 and not split and kind != "ieee":
        wanted |= {(128, 256)}
    if kind == "ieee" and not split:
        wanted |= {(32, 32)}
    assert tiles == wanted
