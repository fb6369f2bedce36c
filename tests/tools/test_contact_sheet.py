"""Tests of tools/contact_sheet.py."""

import h5py
import numpy as np
import pytest
from PIL import Image

from tools.contact_sheet import GREY, MARGIN, TEXT_HEIGHT, THUMBNAIL, main
from tools.make_scenes import make_dataset


def test_sheet_shows_quick_looks_above_labels_and_day_first(tmp_path):
    paths = make_dataset(tmp_path, train=0, inference=3, height=60, width=75, day_share=0.4)
    sheet = tmp_path / "sheet.png"
    assert main([str(tmp_path), "--output", str(sheet), "--scenes", "2", "--columns", "2"]) == 0
    pixels = np.asarray(Image.open(sheet)).astype(float)
    rows, cols = (length + MARGIN for length in THUMBNAIL)
    # Three lines of text: the names of the scenes, and two of the legend.
    assert pixels.shape == (2 * rows + 3 * TEXT_HEIGHT + MARGIN, 2 * cols + MARGIN, 3)
    day, night = (next(p for p in paths if p.parent.name == kind) for kind in ("day", "night"))
    for column, path in enumerate((day, night)):
        of_scene = pixels[:, MARGIN + column * cols : (column + 1) * cols]
        name, looks = of_scene[:TEXT_HEIGHT], of_scene[TEXT_HEIGHT:][: THUMBNAIL[0]]
        label = of_scene[TEXT_HEIGHT + rows :][: THUMBNAIL[0]]
        assert (name < 64).any() and (name[:, -1] == GREY).all()  # a text, which ends
        with h5py.File(path) as file:
            assert label.mean() / 255 == pytest.approx((file["bayes"][...] > 0).mean(), abs=0.01)
        assert (looks.max(axis=-1) == looks.min(axis=-1)).all() == (path == night)
        assert not looks[:, 0].any() and not label[:, 0].any()  # no data at the left


def test_errors_of_masks_are_coloured(tmp_path):
    (path,) = make_dataset(tmp_path, train=0, inference=1, height=131, width=165)
    sheet = tmp_path / "sheet.png"
    command = [str(tmp_path), "--output", str(sheet), "--masks", "threshold", "bayes", "--errors"]
    assert main([*command, "--columns", "1"]) == 0
    pixels = np.asarray(Image.open(sheet))
    with h5py.File(path) as file:
        bts, truth = np.nan_to_num(file["bts"][...]), file["truth"][..., 0] == 1
        masks = bts[..., 2] < 273.15, file["bayes"][..., 0] != 0
    measured = (bts > 0).all(axis=-1)
    for i, mask in enumerate(masks, start=1):
        top = TEXT_HEIGHT + i * (THUMBNAIL[0] + MARGIN)
        drawn = pixels[top : top + THUMBNAIL[0], MARGIN:-MARGIN]
        for colour, expected in (
            ((255, 51, 25), measured & truth & ~mask),
            ((255, 216, 0), measured & ~truth & mask),
        ):
            np.testing.assert_array_equal((drawn == colour).all(axis=-1), expected)
            assert expected.any()
        np.testing.assert_array_equal((drawn == GREY).all(axis=-1), ~measured)
        assert (~measured & mask).any() or i == 2  # the threshold says cloud where there is nothing


def test_sheet_is_as_wide_as_its_scenes_and_long_legends_are_wrapped(tmp_path):
    make_dataset(tmp_path, train=0, inference=1, height=60, width=75)
    sheet = tmp_path / "sheet.png"
    masks = ["bayes", "threshold", "summary"]
    assert main([str(tmp_path), "--output", str(sheet), "--errors", "--masks", *masks]) == 0
    pixels = np.asarray(Image.open(sheet))
    assert pixels.shape[1] == THUMBNAIL[1] + 2 * MARGIN
    legend = pixels[TEXT_HEIGHT + 4 * (THUMBNAIL[0] + MARGIN) :]
    lines = np.split(legend[: len(legend) - MARGIN], (len(legend) - MARGIN) // TEXT_HEIGHT)
    assert len(lines) > 3 and all((line < 64).any() for line in lines)
    assert (legend[:, -MARGIN:] == GREY).all()


def test_scenes_without_label_end_with_advice(tmp_path, capsys):
    make_dataset(tmp_path, train=0, inference=1, height=60, width=75, label="none")
    sheet = ["--output", str(tmp_path / "sheet.png")]
    assert main([str(tmp_path), *sheet]) == 2
    assert "has no dataset 'bayes'. Name masks that all scenes" in (e := capsys.readouterr().err)
    assert "(contact_sheet.py: --masks)" in e
    assert main([str(tmp_path), *sheet, "--masks", "threshold"]) == 0


def test_scenes_without_truth_show_no_errors(tmp_path, capsys):
    (path,) = make_dataset(tmp_path, train=0, inference=1, height=60, width=75)
    with h5py.File(path, "a") as file:
        del file["truth"]
    assert main([str(tmp_path), "--output", str(tmp_path / "sheet.png"), "--errors"]) == 2
    assert "has no dataset 'truth', which --errors needs" in capsys.readouterr().err


def test_other_formats_are_usage_errors(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path), "--output", "sheet.gif"])
    assert "should end in .jpg or .png, found sheet.gif" in capsys.readouterr().err


def test_file_that_is_no_scene_ends_in_one_line(tmp_path, capsys):
    (tmp_path / "S3A_x.hdf").write_bytes(b"no HDF5")
    assert main([str(tmp_path), "--output", str(tmp_path / "sheet.jpg")]) == 2
    assert "S3A_x.hdf" in capsys.readouterr().err
    assert not (tmp_path / "sheet.jpg").exists()
