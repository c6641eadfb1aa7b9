"""Images of more than 8 bits: one rule, inferred from the training images, stored with the run and used ever after."""

import numpy as np
import pytest
from PIL import Image

from bkd_fast.artifact import load_trained
from bkd_fast.data import load_image
from bkd_fast.inference.detector import Detector
from bkd_fast.training.train import train


@pytest.mark.parametrize(("bits", "kind"), [(12, "png"), (16, "tiff"), (0, "tiff")])
def test_a_run_of_wide_images_is_that_of_their_upper_eight_bits(tiny_data, tiny_default, tmp_path, bits, kind):
    """With 0 bits: floats from 0 to 255."""
    detectors = []
    for wide in (False, True):
        folder = tmp_path / f"data{wide}"
        folder.mkdir()
        for path in sorted((tiny_data / "train/good").iterdir()):
            grey = load_image(path)[..., 0]
            grey[0, 0] = 255
            values = grey.astype(np.uint16) << (bits - 8) if bits else grey.astype(np.float32)
            last = folder / (f"{path.stem}.{kind}" if wide else f"{path.stem}.png")
            Image.fromarray(values if wide else grey).save(last)
        run = train(folder, tmp_path / f"run{wide}", tiny_default, progress=False)
        detectors.append(Detector.load(run, device="cpu"))
    config = load_trained(run).config.data
    assert (config.integer_white, config.float_white) == ((2**bits - 1, None) if bits else (None, 255.0))
    expected = detectors[0](grey).score
    assert detectors[1](values).score == expected
    assert detectors[1](last).score == expected
    assert detectors[1](grey).score == expected


def test_evaluation_reads_images_as_training_did(make_category, tiny_default, tmp_path):
    """Test images and masks of more pixels than usual, and pages, follow the run's rules."""
    from bkd_fast.evaluation.evaluate import evaluate

    data = make_category(tmp_path / "data")
    for path in sorted(data.rglob("*.png")):
        if "ground_truth" not in path.parts:
            Image.fromarray(load_image(path)[..., 0].astype(np.uint16) << 2).save(path)
    config = tiny_default.with_changes({"data.integer_white": 1023, "data.max_pixels": 72 * 80})
    run = train(data, tmp_path / "run", config, progress=False)
    assert load_trained(run).config.data == config.data
    assert evaluate(run, pictures=True)["mean"]["image_auroc"] == 1
