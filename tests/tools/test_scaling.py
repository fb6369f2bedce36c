import csv
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import yaml
from matplotlib.figure import Figure

from harness import REPOSITORY
from tools import scaling

COLUMNS = [
    "scaling", "replicas", "nodes", "ranks", "batch_size", "repeats", "patches_per_second",
    "seconds_per_epoch", "speed_up", "efficiency", "min", "median", "max",
]  # fmt: skip


def write_run(folder, replicas, speed, batch_size=32, ranks=1, epochs=3, status="success"):
    folder.mkdir(parents=True)
    results = {
        "status": status,
        "devices": {"replicas": replicas, "ranks": ranks, "nodes": ranks},
        "config": {"batch_size": batch_size},
        "training": {
            "epochs_run": epochs,
            "patches_per_second": speed,
            "train_seconds_per_epoch": [99.0] + [100 / speed] * (epochs - 1),
        },
    }
    (folder / "results.json").write_text(json.dumps(results))
    return str(folder)


def number(text):
    try:
        return float(text)
    except ValueError:
        return text


def scale(output, *arguments):
    """Run the program; return its exit status, the rows of its table and the text."""
    status = scaling.main([*arguments, "-o", str(output)])
    if not (output / "scaling.csv").exists():
        return status, [], ""
    with (output / "scaling.csv").open(newline="") as file:
        rows = [{k: number(v) for k, v in row.items()} for row in csv.DictReader(file)]
    assert (output / "scaling.png").read_bytes().startswith(b"\x89PNG")
    return status, rows, (output / "scaling.txt").read_text()


def test_ideal_line_is_a_speed_up_of_the_number_of_replicas(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    common = {"scaling": "strong", "ranks": 1, "min": 1.0, "median": 2.0, "max": 3.0}
    rows = [common | {"replicas": n, "speed_up": 0.9 * n} for n in (1, 4)]
    scaling.draw(rows, tmp_path / "scaling.png")
    ideal, measured, *_ = figures[0].axes[0].lines
    assert ideal.get_label() == "ideal"
    np.testing.assert_array_equal(ideal.get_xydata(), [[1, 1], [4, 4]])
    np.testing.assert_allclose(measured.get_xydata(), [[1, 0.9], [4, 3.6]])


def amdahl(n, share):
    return 1 / (share + (1 - share) / n)


def test_strong_scaling_recovers_the_serial_share_of_amdahls_law(tmp_path):
    runs = [write_run(tmp_path / str(n), n, 10 * amdahl(n, 0.07)) for n in (4, 1, 8, 2)]
    status, rows, text = scale(tmp_path / "out", *runs)
    assert status == 0
    assert list(rows[0]) == COLUMNS
    assert [(row["scaling"], row["replicas"]) for row in rows] == [
        ("strong", 1), ("strong", 2), ("strong", 4), ("strong", 8),
    ]  # fmt: skip
    assert rows[3]["speed_up"] == pytest.approx(amdahl(8, 0.07))
    assert rows[3]["efficiency"] == pytest.approx(amdahl(8, 0.07) / 8)
    assert text.splitlines()[-1] == "Amdahl's serial share, strong scaling: 7.0%"


def test_weak_scaling_recovers_the_serial_share_of_gustafsons_law(tmp_path):
    # A batch of 8 per replica; S = n - s (n - 1)
    speeds = {n: 10 * (n - 0.1 * (n - 1)) for n in (1, 2, 4)}
    runs = [write_run(tmp_path / str(n), n, speed, 8 * n) for n, speed in speeds.items()]
    _, rows, text = scale(tmp_path / "out", *runs)
    assert [(row["scaling"], row["batch_size"]) for row in rows] == [
        ("weak", 8), ("weak", 16), ("weak", 32),
    ]  # fmt: skip
    assert text.splitlines()[-1] == "Gustafson's serial share, weak scaling: 10.0%"


def test_serial_share_is_fitted_by_least_squares(tmp_path):
    # Weak scaling, points (n - 1, n - S): (1, 0.2) and (3, 0.1); s = (0.2 + 0.3) / (1 + 9)
    runs = [write_run(tmp_path / str(n), n, 10 * s, 8 * n) for n, s in ((1, 1), (2, 1.8), (4, 3.9))]
    assert "weak scaling: 5.0%" in scale(tmp_path / "out", *runs)[2]


def test_speed_up_starts_at_the_fewest_replicas(tmp_path):
    runs = [write_run(tmp_path / str(n), n, speed) for n, speed in ((2, 20), (4, 30))]
    _, rows, _ = scale(tmp_path / "out", *runs)
    assert [row["speed_up"] for row in rows] == [2, 3]  # two replicas count as twice as fast as one


def test_repeats_give_min_median_and_max(tmp_path):
    runs = [write_run(tmp_path / f"1-{i}", 1, speed) for i, speed in enumerate((9, 10, 14))]
    runs += [write_run(tmp_path / "2", 2, 18, epochs=2)]
    _, (one, two), _ = scale(tmp_path / "out", *runs)
    assert (one["min"], one["median"], one["max"], one["repeats"]) == (9, 10, 14, 3)
    assert (two["speed_up"], two["repeats"]) == (pytest.approx(1.8), 1)
    assert two["seconds_per_epoch"] == pytest.approx(100 / 18)  # without the first epoch


def test_processes_and_virtual_devices_are_rows_of_one_series(tmp_path):
    runs = [
        write_run(tmp_path / "1", 1, 10), write_run(tmp_path / "2", 2, 12),
        write_run(tmp_path / "2-2", 2, 14, ranks=2),
    ]  # fmt: skip
    _, rows, _ = scale(tmp_path / "out", *runs)
    found = [(row["replicas"], row["ranks"], row["nodes"], row["speed_up"]) for row in rows]
    assert found == [(1, 1, 1, 1), (2, 1, 1, 1.2), (2, 2, 2, 1.4)]


def test_slower_replicas_have_no_serial_share(tmp_path):
    runs = [write_run(tmp_path / str(n), n, 10 / n) for n in (1, 2)]
    assert "none fits" in scale(tmp_path / "out", *runs)[2]


@pytest.mark.parametrize(
    ("run", "words"),
    [
        (None, "results.json"),
        ({"epochs": 1}, "two epochs"),
        ({"status": "aborted"}, "'aborted'"),
        ({}, "two numbers of replicas"),
    ],
)
def test_runs_that_show_no_scaling_are_rejected(tmp_path, capsys, run, words):
    folder = tmp_path / "run"
    if run is not None:
        write_run(folder, 1, 10, **run)
    assert scale(tmp_path / "out", str(folder)) == (2, [], "")
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("Error: ") and words in error


def test_plan_repeats_outermost_and_makes_no_run_twice():
    runs = scaling.plan([1, 2], [1, 2], ["strong", "weak"], 8, 2)
    assert runs[: len(runs) // 2] == [
        (1, 1, 8, 0), (2, 1, 8, 0), (2, 2, 8, 0), (2, 1, 16, 0), (2, 2, 16, 0),
    ]  # fmt: skip
    assert len(set(runs)) == len(runs) == 10


LAUNCHER = """
import json, pathlib, sys
ranks = int(sys.argv[1].removeprefix("--nodes="))
options = dict(word.split("=", 1) for word in sys.argv[2:] if "=" in word)
if options["epochs"] == "99":
    sys.exit(3)
folder = pathlib.Path(options["output_dir"], options["run_name"])
folder.mkdir(parents=True)
if pathlib.Path("fail").exists() and ranks == 2:
    (folder / "results.json").write_text('{"status": "aborted"}')
    sys.exit(3)
training = {"epochs_run": 3, "patches_per_second": 10 * ranks, "train_seconds_per_epoch": [9, 1, 1]}
(folder / "results.json").write_text(json.dumps({
    "status": "success", "devices": {"replicas": ranks, "ranks": ranks, "nodes": ranks},
    "config": options | {"batch_size": int(options["batch_size"])}, "training": training,
}))
"""


def launch(tmp_path, epochs, **settings):
    launcher = tmp_path / "launcher.py"
    launcher.write_text(LAUNCHER)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    return scale(
        tmp_path / "out", "--config", str(tmp_path / "config.yaml"),
        "--ranks", "1", "2", "--kinds", "weak", "--repeats", "2",
        "--launch", f"{sys.executable} {launcher} --nodes={{ranks}}", "--set", f"epochs={epochs}",
    )  # fmt: skip


def test_launcher_starts_the_runs_of_each_count_once(tmp_path, capsys):
    for _ in range(2):  # the second time all runs exist
        status, rows, _ = launch(tmp_path, epochs=3, batch_size=4)
        assert status == 0
        assert [(row["ranks"], row["batch_size"], row["repeats"]) for row in rows] == [
            (1, 4, 2), (2, 8, 2),
        ]  # fmt: skip
        assert [row["speed_up"] for row in rows] == [1, 2]
    assert len(list((tmp_path / "out/runs").iterdir())) == 4
    launch(tmp_path, epochs=4)  # other settings make other runs
    assert len(list((tmp_path / "out/runs").iterdir())) == 8


def test_finished_runs_with_other_settings_are_not_mixed_in(tmp_path, capsys):
    launch(tmp_path, epochs=3)
    capsys.readouterr()
    assert launch(tmp_path, epochs=3, patience=7, seed=5)[0] == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "made with other settings: seed was 1234, now 5; patience was None, now 7." in error
    assert len(list((tmp_path / "out/runs").iterdir())) == 4


def test_what_exists_is_tabulated_and_aborted_runs_are_repeated(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = [write_run(tmp_path / f"of-{n}", n, 10 * n) for n in (1, 2)]
    assert scale(tmp_path / "out", *runs)[0] == 0
    launch(tmp_path, epochs=3)
    finished = sorted((tmp_path / "out/runs").glob("*-ranks2-*"))
    for run in finished:  # as if they had been killed
        (run / "results.json").write_text('{"status": "running"}')
    (tmp_path / "fail").touch()
    capsys.readouterr()
    status, rows, _ = launch(tmp_path, epochs=3)
    assert status == 2
    error = capsys.readouterr().err
    assert "ended with exit status 3" in error and f"Run 2 of 4, {finished[0]}: starts" in error
    (tmp_path / "fail").unlink()
    status, rows, _ = launch(tmp_path, epochs=3)
    assert status == 0
    assert [(row["ranks"], row["repeats"]) for row in rows] == [(1, 2), (2, 2)]
    # Each that was killed, and the one that failed
    assert len(list((tmp_path / "out/runs").glob("*-ranks2-*-aborted-*"))) == 3


def test_launcher_that_fails_is_an_error(tmp_path, capsys):
    assert launch(tmp_path, epochs=99) == (2, [], "")
    assert "exit status 3" in capsys.readouterr().err.splitlines()[-1]


def test_failure_of_a_run_is_reported_although_the_plot_fails_too(tmp_path, capsys, monkeypatch):
    launch(tmp_path, epochs=3)
    (run, *_) = sorted((tmp_path / "out/runs").glob("*-ranks2-*"))
    (run / "results.json").write_text('{"status": "running"}')
    (tmp_path / "fail").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # not installed
    assert launch(tmp_path, epochs=3)[0] == 2
    *_, plotting, failure = capsys.readouterr().err.splitlines()
    assert "matplotlib" in plotting and "exit status 3" in failure


def test_tensorflow_is_not_imported():
    code = "import sys; from tools import scaling; print('tensorflow' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY / "tools")}
    command = [sys.executable, "-c", code]
    answer = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip() == "False"


@pytest.mark.slow
def test_runs_are_made_here_and_tabulated(settings, tmp_path):
    (tmp_path / "config.yaml").write_text("")
    options = [f"{k}={v}" for k, v in settings.items() if k != "batch_size"]
    status, rows, _ = scale(
        tmp_path / "out", "--config", str(tmp_path / "config.yaml"), "--replicas", "1",
        "--ranks", "2", "--kinds", "strong", "--batch-size", "11", "--repeats", "1",
        "--set", *options,
    )  # fmt: skip
    assert status == 0
    assert [(row["replicas"], row["ranks"]) for row in rows] == [(1, 1), (2, 2)]


EDITS = [  # part of results.json, field, value in a file of somebody else
    *(("devices", "replicas", value) for value in (None, "2", [2], 10**400, 0, True)),
    *(("config", "batch_size", value) for value in (None, [32], 10**400)),
    *(("training", "epochs_run", value) for value in (None, "3")),
    *(("training", "train_seconds_per_epoch", value) for value in (None, "x", [1.0], [1, "x", {}])),
]


@pytest.mark.parametrize(("part", "field", "value"), EDITS)
def test_run_with_values_of_other_types_ends_in_one_line(tmp_path, capsys, part, field, value):
    folder = write_run(tmp_path / "a", 1, 10.0)
    results = json.loads((tmp_path / "a/results.json").read_text())
    results[part][field] = value
    (tmp_path / "a/results.json").write_text(json.dumps(results))
    assert scaling.main([folder, write_run(tmp_path / "b", 2, 19.0), "-o", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"Error: {folder}")


def test_runs_to_read_and_runs_to_make_are_a_usage_error(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        scaling.main([str(tmp_path), "--replicas", "1", "2", "-o", str(tmp_path / "out")])
    assert "omit them, or --replicas and --ranks" in capsys.readouterr().err
