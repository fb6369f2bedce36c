import csv
import json
import math
import os
import subprocess
import sys

import pytest
from conftest import results

from harness import REPOSITORY
from harness.errors import UserError
from harness.inference.scores import MEAN_SCORES
from harness.records.saved_runs import (
    MEASURES,
    circumstances,
    differences,
    measures,
    read_run,
    repeats,
)
from tools import compare
from tools.lib.markdown import markdown


def copy(finished, folder, change=lambda found: None):
    """A run's folder as another run of the same kind would leave it, its results changed."""
    # The code that is tested may have changes; no other run has this run's log.
    found = results(finished) | {"git_commit": "0" * 40, "mlperf_sha256": str(folder)}
    found |= {"warnings": []}  # the run of the tests is too short to learn
    change(found)
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps(found))
    for name in ("history.csv", "scenes.csv"):
        (folder / name).write_text((finished / name).read_text())
    return folder


def with_speed(value, **config):
    def change(found):
        found["training"]["patches_per_second"] = value
        found["config"] |= config
        found["peak_rss"] = 1000 * value

    return change


@pytest.fixture
def three(finished, tmp_path):
    """Two repeats and a run of another learning rate."""
    return [
        copy(finished, tmp_path / "a", with_speed(10.0, run_name="a", output_dir="/x")),
        copy(finished, tmp_path / "b", with_speed(14.0, run_name="b")),
        copy(finished, tmp_path / "c", with_speed(20.0, learning_rate=0.5)),
    ]


# --- reading runs


def test_tables_of_a_run_are_read_with_numbers(tmp_path):
    files = {
        "results.json": '{"status": "success", "config": null}',
        "history.csv": "epoch,val_loss\n1,0.25\n2,nan\n",
        "scenes.csv": "scene,tp\nS3A_1,7\n",
        "samples.csv": "time,memory\n0.5,1000\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    run = read_run(tmp_path)
    assert (run.status, run.name, run.results["config"]) == ("success", tmp_path.name, {})
    assert run.history[0] == {"epoch": 1, "val_loss": 0.25} and isinstance(
        run.history[0]["epoch"], int
    )
    assert [row["epoch"] for row in run.history] == [1, 2] and math.isnan(
        run.history[1]["val_loss"]
    )
    assert run.scenes == [{"scene": "S3A_1", "tp": 7}]
    assert run.samples == [{"time": 0.5, "memory": 1000}]


def test_measures_are_those_of_results_and_history(finished):
    run, found = measures(read_run(finished)), results(finished)
    assert list(run) == ["status", *MEASURES]
    seconds = [row["seconds"] for row in read_run(finished).history]
    assert run["seconds_per_epoch"] == pytest.approx(sum(seconds) / len(seconds))
    assert run["val_loss"] == found["training"]["val_loss"]
    assert run["seconds_per_scene"] == found["inference"]["seconds_per_scene"]
    assert run["peak_gpu_memory"] is None and run["energy_joules"] is None


def test_greatest_gpu_and_energy_are_read(finished, tmp_path):
    def change(found):
        found |= {"peak_gpu_memory": [5, 9, 7], "sampling": {"energy_joules": 12.5}}

    found = measures(read_run(copy(finished, tmp_path / "a", change)))
    assert found["peak_gpu_memory"] == 9 and found["energy_joules"] == 12.5


@pytest.mark.parametrize("values", [{"status": "starting", "mode": "train", "parts": []}])
def test_run_that_has_just_begun_is_read(tmp_path, values):
    (tmp_path / "results.json").write_text(json.dumps(values))
    run = read_run(tmp_path)
    assert run.results["config"] == {} and run.history == []
    assert {name for name, value in measures(run).items() if value is not None} == {"status"}


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1" + "0" * 400, '"fast"', "[]", "true"])
def test_number_that_is_none_is_left_out(finished, tmp_path, number):
    folder = copy(finished, tmp_path / "a", lambda found: found.update(peak_rss="HERE"))
    text = (folder / "results.json").read_text().replace('"HERE"', number)
    (folder / "results.json").write_text(text)
    assert measures(read_run(folder))["peak_rss"] is None


@pytest.mark.parametrize(
    "content",
    [None, "{", "[]", "{}", '{"status": 3}', '{"status": "success", "config": [1]}', "[" * 100000],
)
def test_folder_of_no_run_is_one_line(tmp_path, content, capsys):
    if content:
        (tmp_path / "results.json").write_text(content)
    assert compare.main([str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(tmp_path) in line and "Name the folder of a run" in line


@pytest.mark.parametrize("row", ["1,2,3\n", "1,2,3,4,5,6,7,8,9\n", '1,"2\n'])
def test_torn_table_is_one_line(finished, tmp_path, row, capsys):
    folder = copy(finished, tmp_path / "a")
    with (folder / "history.csv").open("a") as file:
        file.write(row)
    assert compare.main([str(folder)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "history.csv" in line


# --- what differs, and repeats


def test_names_and_places_make_no_difference(three):
    a, b, c = map(read_run, three)
    assert differences([a, b]) == {}
    assert differences([a, b, c]) == {
        "config.learning_rate": [*[a.results["config"]["learning_rate"]] * 2, 0.5]
    }


@pytest.mark.parametrize("name", ["git_commit", "scenes_sha256", "mode"])
def test_other_code_or_data_is_no_repeat(finished, tmp_path, name):
    folders = [
        copy(finished, tmp_path / "a"),
        copy(finished, tmp_path / "b", lambda found: found.update({name: "other"})),
    ]
    runs = list(map(read_run, folders))
    assert list(differences(runs)) == [name] and len(repeats(runs)) == 2


@pytest.mark.parametrize("part", ["devices", "versions", "config"])
def test_each_key_of_a_part_counts(finished, tmp_path, part):
    def change(found):
        del found[part][next(iter(found[part]))]

    folders = copy(finished, tmp_path / "a"), copy(finished, tmp_path / "b", change)
    runs = list(map(read_run, folders))
    first = next(iter(results(finished)[part]))
    assert list(differences(runs)) == [f"{part}.{first}"] and len(repeats(runs)) == 2
    assert f"{part}.{first}" in circumstances(runs[0])


def test_only_successes_repeat_one_another(finished, tmp_path):
    def abort(found):
        found["status"] = "aborted"

    folders = [copy(finished, tmp_path / n, abort if n == "b" else lambda found: 0) for n in "abcd"]
    assert [[run.name for run in group] for group in repeats(map(read_run, folders))] == [
        ["a", "c", "d"],
        ["b"],
    ]


def test_other_seed_repeats_only_where_asked(finished, tmp_path):
    folders = [
        copy(finished, tmp_path / str(seed), with_speed(10.0 * seed, seed=seed)) for seed in (1, 3)
    ]
    assert compare.compare(folders).spreads == {}
    assert compare.compare(folders, any_seed=True).spreads[1, 2]["patches_per_second"][0] == 20.0


# --- tables


def test_mean_and_deviation_are_those_of_the_repeats(three):
    (spread,) = compare.compare(three).spreads.items()
    assert spread[0] == (1, 2)
    # sqrt(((10 - 12)^2 + (14 - 12)^2) / (2 - 1))
    assert spread[1]["patches_per_second"] == (12.0, pytest.approx(8**0.5))
    assert spread[1]["val_loss"][1] == 0 and "energy_joules" not in spread[1]


def test_terminal_shows_all_in_80_columns(three, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert compare.main(list(map(str, three))) == 0
    text = capsys.readouterr().out
    lines = [line.split() for line in text.splitlines()]
    assert ["patches/s", "10.0", "14.0", "20.0"] in lines
    assert ["patches/s", "12.0", "±", "2.8"] in lines
    assert ["config.learning_rate", "1e-05", "1e-05", "0.5"] in lines
    assert ["network", "unet", "unet", "unet"] in lines
    assert ["parameters", *["1948609"] * 3] in lines and ["loss", *["cross_entropy"] * 3] in lines
    assert "energy" not in text and "GPU" not in text  # no run has them
    assert max(map(len, text.splitlines()[3:])) <= 80  # after the folders' names


def test_columns_that_do_not_fit_follow_below(finished, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    folders = [str(copy(finished, tmp_path / str(i), with_speed(i + 1.0))) for i in range(12)]
    assert compare.main(folders) == 0
    text = capsys.readouterr().out.partition("Mean")[0].partition("\n\n")[2]
    assert max(map(len, text.splitlines())) <= 80
    speeds = [line.split()[1:] for line in text.splitlines() if line.startswith("patches/s")]
    assert len(speeds) > 1 and sum(speeds, []) == [f"{i + 1}.0" for i in range(12)]


def test_long_differences_of_three_runs_stand_side_by_side(finished, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for n in range(3):
        folder = f"/scratch/a/long/path/of/folders/to/scenes/{n}"
        copy(finished, tmp_path / str(n), with_speed(10.0, train_dir=folder))
    assert compare.main([str(tmp_path / str(n)) for n in range(3)]) == 0
    text = capsys.readouterr().out
    (line,) = (line for line in text.splitlines() if line.startswith("config.train_dir"))
    assert [cell[-2:] for cell in line.split()[1:]] == ["/0", "/1", "/2"]


def test_csv_holds_all_digits_and_reads_back(three, tmp_path):
    assert compare.main([*map(str, three), "-o", str(tmp_path / "t.csv")]) == 0
    with (tmp_path / "t.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["row"] for row in rows] == ["run", "run", "run", "mean", "sd"]
    assert [row["repeats"] for row in rows] == ["1", "1", "", "1", "1"]
    assert float(rows[0]["accuracy"]) == results(three[0])["inference"]["accuracy"]
    assert float(rows[3]["patches_per_second"]) == 12.0
    texts = [rows[0][name] for name in ("status", "network", "parameters", "loss", "labels")]
    assert texts == ["success", "unet", "1948609", "cross_entropy", "bayes"]
    assert [row["config.learning_rate"] for row in rows] == ["1e-05", "1e-05", "0.5", "", ""]


def test_run_of_version_0_1_has_dashes_for_its_network(finished, tmp_path, capsys):
    def forget(found):
        del found["network"], found["training"]["loss_function"]

    assert compare.main([str(copy(finished, tmp_path / "a", forget))]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [["network", "-"], ["parameters", "-"], ["loss", "-"]] == lines[4:7]


def test_all_scores_with_a_mean_are_compared(finished, capsys):
    assert compare.main([str(finished)]) == 0
    lines = [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()]
    inference = results(finished)["inference"]
    for name, score in MEAN_SCORES.items():
        assert score.label in lines or math.isnan(inference[name] or math.nan)


def test_markdown_has_a_row_per_run_and_as_many_cells_everywhere(three, tmp_path):
    assert compare.main([*map(str, three), "-o", str(tmp_path / "t.md")]) == 0
    runs, *_, differing = (tmp_path / "t.md").read_text().strip().split("\n\n")
    cells = [line.strip("|").split(" | ") for line in runs.splitlines()]
    assert len({len(row) for row in cells}) == 1 and len(cells) == 2 + 3 + 1
    assert cells[-1][1] == "mean ± sd" and "12.0 ± 2.8" in cells[-1]
    assert differing.splitlines()[-1].startswith(r"| config.learning\_rate | 1e-05 | 1e-05 | 0.5")


def test_names_of_runs_are_escaped(finished, tmp_path, capsys):
    name = "x\n| 1 | <b>\x1b[2mforged"
    folder = copy(finished, tmp_path / name, with_speed(1.0, platform="a|b\n<script>"))
    other = copy(finished, tmp_path / "other", with_speed(1.0))
    assert compare.main([str(folder), str(other), "-o", str(tmp_path / "t.md")]) == 0
    text = (tmp_path / "t.md").read_text()
    # Heads and two runs; that they are synthetic; heads and platform; blank lines between these.
    assert len(text.splitlines()) == 4 + 1 + 1 + 1 + 3
    assert r"x\\n\| 1 \| \<b\>" in text and "<script>" not in text
    out = capsys.readouterr().out
    assert "\x1b" not in out and r"x\n| 1 |" in out


def test_repeats_of_changed_code_are_reported(finished, tmp_path, capsys):
    def dirty(found):
        found["git_commit"] = "0123-dirty"

    folders = [str(copy(finished, tmp_path / name, dirty)) for name in "ab"]
    assert compare.main(folders) == 0
    assert "had changes (-dirty)" in capsys.readouterr().out


def test_warnings_and_synthetic_scenes_are_shown_with_the_number_of_the_run(
    finished, tmp_path, capsys
):
    def warn(found):
        found["warnings"] = ["The loss <b>\x1b[2J rose.", 3]

    def real(found):
        found["training"]["synthetic"] = found["inference"]["synthetic"] = False

    folders = [str(copy(finished, tmp_path / "a", real)), str(copy(finished, tmp_path / "b", warn))]
    assert compare.main([*folders, "-o", str(tmp_path / "t.md")]) == 0
    out, text = capsys.readouterr().out, (tmp_path / "t.md").read_text()
    assert "Run 2: the scenes are synthetic.\n" in out and "Run 2: the scenes are synth" in text
    assert r"Run 2: The loss <b>\x1b[2J rose." in out.splitlines() and "Run 2: 3" in out
    assert r"Run 2: The loss \<b\>\\x1b\[2J rose." in text.splitlines()


def test_baselines_follow_the_score_of_the_same_pixels(finished, capsys):
    assert compare.main([str(finished)]) == 0
    labels = [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()]
    first = labels.index("accuracy")
    assert labels[first : first + 9] == [
        "accuracy", "all cloud", "threshold", "accuracy, no data is clear",
        "all cloud, no data is clear", "threshold, no data is clear", "valid accuracy",
        "valid all cloud", "valid threshold",
    ]  # fmt: skip


def test_runs_with_the_same_name_are_named_by_their_folders(finished, tmp_path):
    for parent in "ab":
        (tmp_path / parent).mkdir()
    folders = [str(copy(finished, tmp_path / parent / "run")) for parent in "ab"]
    assert compare.main([*folders, "-o", str(tmp_path / "t.csv")]) == 0
    with (tmp_path / "t.csv").open(newline="") as file:
        assert [row["run"] for row in csv.DictReader(file)][:2] == folders
    assert compare.main([*folders, "-o", str(tmp_path / "t.md")]) == 0
    assert all(markdown(name) in (tmp_path / "t.md").read_text() for name in folders)


def test_copies_of_a_run_are_reported(finished, tmp_path, capsys):
    def same_log(found):
        found["mlperf_sha256"] = "1" * 64

    folders = [copy(finished, tmp_path / "a", same_log), copy(finished, tmp_path / "b")]
    assert compare.main(list(map(str, folders))) == 0
    assert "copy" not in capsys.readouterr().out
    folders.append(copy(finished, tmp_path / "c", same_log))
    assert compare.main([*map(str, folders), "-o", str(tmp_path / "t.md")]) == 0
    text = "Runs 1 and 3 have the same MLPerf log: one is a copy."
    assert text in capsys.readouterr().out.splitlines()
    assert text in (tmp_path / "t.md").read_text().splitlines()


def test_damaged_samples_matter_only_where_they_are_used(finished, tmp_path, capsys):
    folder = copy(finished, tmp_path / "a")
    samples = (finished / "samples.csv").read_text()
    (folder / "samples.csv").write_text(samples + "1,2")  # as a crash leaves it
    assert read_run(folder).samples == read_run(finished).samples != []
    (folder / "samples.csv").write_text(samples + "1,2\n")
    assert compare.main([str(folder)]) == 0
    with pytest.raises(UserError, match="samples.csv"):
        _ = read_run(folder).samples


def test_terminal_without_plus_minus_has_a_table(three):
    command = [sys.executable, REPOSITORY / "tools/compare.py", *three]
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    answer = subprocess.run(command, capture_output=True, text=True, env=env, check=True)
    assert "12.0 ? 2.8" in answer.stdout


def test_one_run_is_a_table_too(finished, capsys):
    assert compare.main([str(finished)]) == 0
    text = capsys.readouterr().out
    assert "Mean" not in text and "iffer" not in text and "validation accuracy" in text


def test_run_that_is_given_twice_is_rejected(finished, tmp_path, capsys):
    (tmp_path / "link").symlink_to(finished)
    assert compare.main([str(finished), str(tmp_path / "link")]) == 2
    assert "is given twice" in capsys.readouterr().err


def test_other_output_formats_are_rejected_first(finished, tmp_path, capsys):
    assert compare.main([str(finished), "-o", str(tmp_path / "t.xlsx")]) == 2
    assert ".csv or .md" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_read_run_names_the_folder():
    with pytest.raises(UserError, match="/nowhere"):
        read_run("/nowhere")


def test_command_runs_from_any_folder_without_tensorflow(finished, tmp_path):
    (tmp_path / "tensorflow.py").write_text("raise SystemExit('TensorFlow was imported')")
    command = [sys.executable, REPOSITORY / "tools/compare.py", finished]
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    subprocess.run(command, cwd=tmp_path, env=env, check=True, stdout=subprocess.DEVNULL)
