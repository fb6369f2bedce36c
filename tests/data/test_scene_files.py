import logging
import os
import re
from pathlib import Path

import pytest

from harness.data.scene_files import SceneError, day_or_night, find_scenes, product_times


def make(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_scenes_are_found_in_one_order_below_day_and_night(tmp_path):
    make(tmp_path, "night/S3A_b.hdf", "day/S3A_c.hdf", "day/deep/S3B_a.hdf", "day/other.hdf")
    make(tmp_path, "day-2/S3D_a.hdf", "day/S3E_a.hdf")  # '-' is less than '/': no order of texts
    found = [str(path.relative_to(tmp_path)) for path in find_scenes(tmp_path)]
    assert found == ["day/S3A_c.hdf", "day/deep/S3B_a.hdf", "day-2/S3D_a.hdf", "night/S3A_b.hdf"]


@pytest.mark.parametrize("name", ["absent", "empty", "empty/file"])
def test_missing_data_names_the_directory(tmp_path, name):
    make(tmp_path, "empty/file")
    with pytest.raises(FileNotFoundError, match=re.escape(f"{tmp_path / name}. Set train_dir")):
        find_scenes(tmp_path / name)


def test_list_of_scenes_is_read_like_their_folder(tmp_path):
    make(tmp_path, "night/S3A_b.hdf", "day/S3A_c.hdf")
    lines = ["night/S3A_b.hdf", "", f"{tmp_path}/day/S3A_c.hdf\r", "  "]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    assert find_scenes(tmp_path / "list.txt") == find_scenes(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"S3A_a.hdf\nS3A_b.SEN3\n", "entry 2 is 'S3A_b.SEN3'"),
        (b"S3A_a.hdf\nx/S3A_a.hdf\n", "1 duplicate scene name"),
        (b"\x89HDF\r\n", "should be a directory, or a list of scenes"),
    ],
)
def test_file_that_lists_something_else_is_an_error(tmp_path, content, message):
    (tmp_path / "list.txt").write_bytes(content)
    with pytest.raises(SceneError, match=message):
        find_scenes(tmp_path / "list.txt")


def test_linked_folders_are_searched_and_circles_end(tmp_path):
    make(tmp_path, "elsewhere/S3A_a.hdf", "data/x")
    (tmp_path / "data/night").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data/circle").symlink_to(tmp_path / "data")
    assert find_scenes(tmp_path / "data") == [tmp_path / "data/night/S3A_a.hdf"]


def test_folder_that_cannot_be_listed_is_an_error(tmp_path, monkeypatch):
    make(tmp_path, "day/S3A_a.hdf", "night/S3A_b.hdf")
    scandir = os.scandir

    def refuse(folder):  # as root may list any folder
        if os.fspath(folder).endswith("night"):
            raise PermissionError(13, "Permission denied", os.fspath(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match="night"):
        find_scenes(tmp_path)


def test_hidden_folders_are_skipped(tmp_path, caplog):
    hidden = (".Trash-1000/files", ".snapshot/daily", "day/.ipynb_checkpoints")
    make(tmp_path, "day/S3A_a.hdf", *(f"{folder}/S3A_a.hdf" for folder in hidden))
    make(tmp_path, "day/._S3A_a.hdf", "day/.S3A_b.hdf.download")
    caplog.set_level(logging.INFO)
    assert find_scenes(tmp_path) == [tmp_path / "day/S3A_a.hdf"] and not caplog.messages
    assert find_scenes(tmp_path / ".snapshot") == [tmp_path / ".snapshot/daily/S3A_a.hdf"]


NEAR_MISSES = {
    "name of a copy": [
        "S3A_a (1).hdf", "S3A_a - Copy.hdf", "S3A_a copy 2.hdf", "S3A_a-Copy1.hdf",
        "S3A_a_copy.hdf", "Copy of S3A_a.hdf", "S3A_a-checkpoint.hdf",
    ],
    "names of scenes are": [
        "S3A_b.HDF", "S3A_b.h5", "S3A_b.hdf5", "S3A_b.he5", "s3a_b.hdf", "S3A_b.hdf.gz",
        "S3A_b.hdf.part", "S3A_b.hdf.1", "xS3A_b.hdf",
    ],
    "tools/convert_sen3.py": ["S3A_c.SEN3.zip", "S3A_c.sen3/x.nc", "S3A_d.SEN3/x.nc",
                              "S3B_c.SEN3.tar"],
    "a folder is no scene": ["S3A_e.hdf/x", "S3A_f.h5/x"],
}  # fmt: skip


def test_names_that_only_look_like_scenes_are_ignored_and_reported_once(tmp_path, caplog):
    make(tmp_path, "day/S3A_a.hdf", "day/S3A.b-c.hdf", "day/README", "day/S2A_a.h5", "day/x.hdf")
    make(tmp_path, *(f"day/{name}" for names in NEAR_MISSES.values() for name in names))
    caplog.set_level(logging.INFO)
    assert [path.name for path in find_scenes(tmp_path)] == ["S3A.b-c.hdf", "S3A_a.hdf"]
    assert len(caplog.messages) == len(NEAR_MISSES)
    for words, names in NEAR_MISSES.items():
        (line,) = (line for line in caplog.messages if words in line)
        assert f": {len(names)} names, for example '" in line


def test_two_versions_of_a_product_are_reported(tmp_path, caplog):
    times = "S3A_SL_1_RBT____20191001T113321_20191001T113621"
    first, second = f"{times}_20191001T140000_NR.hdf", f"{times}_20191002T040000_NT.hdf"
    make(tmp_path, first, second, f"{second.replace('S3A', 'S3B')}", "S3A_a.hdf", "S3A_b.hdf")
    caplog.set_level(logging.INFO)
    assert len(find_scenes(tmp_path)) == 5
    (line,) = caplog.messages
    assert line.startswith("2 scenes below ") and f"{first} and {second}" in line


def test_duplicate_names_are_an_error(tmp_path):
    make(tmp_path, "night/S3A_a.hdf", "day/S3A_a.hdf", "day/S3A_b.hdf")
    with pytest.raises(SceneError, match="1 duplicate scene name under .*, for example S3A_a.hdf"):
        find_scenes(tmp_path)


@pytest.mark.parametrize(
    ("path", "name"),
    [("/a/day/S3A.hdf", "day"), ("/day/night/x/S3A.hdf", "night"), ("/a/S3A-day.hdf", "unknown")],
)
def test_day_and_night_come_from_the_folder(path, name):
    assert day_or_night(Path(path)) == name


@pytest.mark.parametrize(
    ("start", "found"),
    [("20191001T113321", ("2019-10-01T11:33:21+00:00", "2019-10-01T11:36:21+00:00")),
     ("20191301T113321", None)],
)  # fmt: skip
def test_times_come_from_the_product_name(start, found):
    name = f"S3A_SL_1_RBT____{start}_20191001T113621_20191002T040000_0179_LN2"
    times = product_times(name)
    assert (times and tuple(time.isoformat() for time in times)) == found
    assert product_times("S3A_x") is None
