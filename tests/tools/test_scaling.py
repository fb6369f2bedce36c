import csv
import json

import pytest

from tools import scaling


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


def amdahl(n, share):
    return 1 / (share + (1 - share) / n)


def test_serial_share_of_amdahls_law_is_recovered(tmp_path):
    runs = [write_run(tmp_path / str(n), n, 10 * amdahl(n, 0.07)) for n in (1, 2, 4, 8)]
    assert scaling.main([*runs, "-o", str(tmp_path / "out")]) == 0
    with (tmp_path / "out/scaling.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == list(scaling.COLUMNS)
    assert [row["scaling"] for row in rows] == ["strong"] * 4
    assert float(rows[3]["speed_up"]) == pytest.approx(amdahl(8, 0.07))
    assert float(rows[3]["efficiency"]) == pytest.approx(amdahl(8, 0.07) / 8)
    numbers = [
        {**row, "replicas": int(row["replicas"]), "speed_up": float(row["speed_up"])}
        for row in rows
    ]
    assert scaling.serial_share(numbers) == pytest.approx(0.07)
    assert (tmp_path / "out/scaling.png").read_bytes().startswith(b"\x89PNG")


def test_weak_scaling_keeps_the_batch_a_replica(tmp_path):
    speeds = {n: 10 * (n - 0.1 * (n - 1)) for n in (1, 2, 4)}
    runs = [
        scaling.read_run(write_run(tmp_path / str(n), n, speed, 8 * n))
        for n, speed in speeds.items()
    ]
    rows = scaling.tabulate(runs)
    assert {row["scaling"] for row in rows} == {"weak"}
    assert scaling.serial_share(rows) == pytest.approx(0.1)


def test_repeats_give_min_median_and_max(tmp_path):
    runs = [write_run(tmp_path / f"1-{i}", 1, speed) for i, speed in enumerate((9, 10, 14))]
    runs += [write_run(tmp_path / "2", 2, 18)]
    one, two = scaling.tabulate([scaling.read_run(run) for run in runs])
    assert (one["min"], one["median"], one["max"], one["repeats"]) == (9, 10, 14, 3)
    assert two["speed_up"] == pytest.approx(1.8)
    assert two["seconds_per_epoch"] == pytest.approx(100 / 18)  # without the first


def test_plan_repeats_outermost_and_makes_no_run_twice():
    runs = scaling.plan([1, 2], [1, 2], ["strong", "weak"], 8, 2)
    assert runs[: len(runs) // 2] == [
        (1, 1, 8, 0), (2, 1, 8, 0), (2, 2, 8, 0), (2, 1, 16, 0), (2, 2, 16, 0),
    ]  # fmt: skip
    assert len(set(runs)) == len(runs) == 10


def test_slower_replicas_have_no_serial_share():
    row = {"scaling": "strong", "replicas": 2, "ranks": 1, "nodes": 1, "batch_size": 8,
           "speed_up": 0.7, "efficiency": 0.35, "min": 1.0, "median": 1.0, "max": 1.0}  # fmt: skip
    assert "none fits" in scaling.text_table([row])


@pytest.mark.parametrize("what", ["absent", "one epoch", "one count", "aborted"])
def test_what_shows_no_scaling_is_refused(tmp_path, capsys, caplog, what):
    folder = tmp_path / "run"
    if what != "absent":
        status = "aborted" if what == "aborted" else "success"
        write_run(folder, 1, 10, epochs=1 if what == "one epoch" else 3, status=status)
    assert scaling.main([str(folder), "-o", str(tmp_path / "out")]) == 2
    assert "Error: " in caplog.text


@pytest.mark.slow
def test_runs_are_made_here_and_tabulated(settings, tmp_path):
    (tmp_path / "config.yaml").write_text("")
    options = [f"{k}={v}" for k, v in settings.items() if k != "batch_size"]
    status = scaling.main(
        ["-o", str(tmp_path), "--config", str(tmp_path / "config.yaml"), "--replicas", "1",
         "--ranks", "2", "--kinds", "strong", "--batch-size", "11", "--repeats", "1",
         "--set", *options]
    )  # fmt: skip
    assert status == 0
    with (tmp_path / "scaling.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["replicas"], row["ranks"]) for row in rows] == [("1", "1"), ("2", "2")]
