import csv
import re
import shutil

import h5py
import numpy as np
import pytest
import yaml
from conftest import results

import slstr_cloud
from harness import REPOSITORY
from harness.errors import UserError
from tools import study
from tools.lib import series
from tools.lib.study import pareto_front, spread

REGIMES = ("clear", "warm_cloud", "cold_cloud")


def add_regimes(path):
    """Divide a scene into two regimes, by its truth and by columns."""
    with h5py.File(path, "a") as file:
        codes = file["truth"][:] * np.where(np.arange(file["truth"].shape[1]) < 50, 1, 2)[:, None]
        del file["cloud_regime"]
        regimes = file.create_dataset("cloud_regime", data=codes.astype(np.uint8))
        regimes.attrs["flag_meanings"] = " ".join(REGIMES)


@pytest.fixture
def in_process(monkeypatch):
    """Runs are made in this process; returns the names of those that were started."""
    started = []

    def start(run, options):
        started.append(run.folder.name)
        if slstr_cloud.main(options):
            raise UserError(f"{run.folder.name} failed.")

    monkeypatch.setattr(series, "_start", start)
    return started


@pytest.fixture
def write(tmp_path, settings):
    """Write a study, with changed values; returns its path."""
    config = {**settings, "epochs": 9, "sampling": False}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))

    def write_study(**changed):
        values = {
            "output": str(tmp_path / "study"), "config": str(tmp_path / "config.yaml"),
            "budget": {"epochs": 1}, "seeds": [1, 2], "vary": {"network": ["pixel", "stem_2x2"]},
        } | changed  # fmt: skip
        path = tmp_path / "tiny.yaml"
        values = {key: value for key, value in values.items() if value is not None}
        path.write_text(yaml.safe_dump(values, sort_keys=False))
        return str(path)

    return write_study


def rows(folder):
    with (folder / "study/runs.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_study_of_two_networks_and_seeds(write, in_process, dataset, tmp_path, capsys):
    scenes = tmp_path / "ssts"
    shutil.copytree(dataset / "ssts", scenes)
    paths = sorted(scenes.rglob("*.hdf"))
    for path in paths:
        add_regimes(path)
    change = {"inference_dir": str(scenes)}
    path = write(set=change)
    # The first seed of all networks, then the second: a slow hour affects all networks.
    names = [f"{network}-seed-{seed}" for seed in (1, 2) for network in ("pixel", "stem_2x2")]
    assert study.main([path]) == 0
    assert in_process == names
    assert "Run 4 of 4" in (screen := capsys.readouterr()).err
    found = {row["run"]: row for row in rows(tmp_path)}
    truths = []
    for name in names:
        folder = tmp_path / "study/runs" / name
        run, row = results(folder), found[name]
        assert run["training"]["epochs_run"] == 1 and run["config"]["seed"] == int(name[-1])
        assert row["case"] == run["network"]["name"] == name.partition("-seed")[0]
        assert row["network"] == row["case"]
        assert float(row["accuracy"]) == run["inference"]["accuracy"]
        assert float(row["training_seconds"]) == run["training"]["seconds"]
        right, of_cold = [], []
        for scene in paths:
            with h5py.File(scene) as file, h5py.File(folder / f"masks/{scene.stem}.h5") as masks:
                valid = (file["bts"][:] > 0).all(axis=-1)
                right.append((masks["mask"][:] == file["truth"][..., 0])[valid].mean())
                is_cold = valid & (file["cloud_regime"][..., 0] == 2)
                of_cold += masks["mask"][:][is_cold].tolist()  # where the truth is cloud
        assert float(row["truth_cloud_regime_cold_cloud"]) == pytest.approx(np.mean(of_cold))
        truths.append(np.mean(right))
        assert float(row["truth_accuracy"]) == pytest.approx(truths[-1])
    page = (tmp_path / "study/study.html").read_text()
    for shown in (f"{np.mean(truths[::2]):.4f} ± {np.std(truths[::2], ddof=1):.4f}", "1,751"):
        assert shown in page and shown in screen.out
    agreements = []
    for scene in paths:
        with h5py.File(scene) as file:
            valid = (file["bts"][:] > 0).all(axis=-1)
            is_cloud = file["bayes"][..., 0] != 0, file["bts"][..., 2] < run["config"]["MIN_SST"]
            agreements.append([np.mean((m == file["truth"][..., 0])[valid]) for m in is_cloud])
    for name, agreement in zip(("label", "threshold"), np.mean(agreements, axis=0), strict=True):
        (line,) = [line for line in screen.out.splitlines() if line.startswith(f"{name} ")]
        assert f"{agreement:.4f}" in line.split()
    assert page.count("<svg") == 4 and "cold cloud" in page  # label and truth over two times

    assert study.main([write(set=change, seeds=[1, 2, 3])]) == 0
    assert in_process[4:] == ["pixel-seed-3", "stem_2x2-seed-3"]  # the others are kept
    text = (tmp_path / "study/study.html").read_text()
    arguments = [write(set=change, seeds=[1, 2, 3]), "--page-only", "--set", "augment=none"]
    assert study.main(arguments) == 0
    assert len(in_process) == 6 and (tmp_path / "study/study.html").read_text() == text


def test_run_that_fails_is_reported_and_the_others_are_made(write, in_process, tmp_path, capsys):
    path = write(seeds=[1], vary={"network": ["pixel"], "loss": ["squared", "cross_entropy"]})
    assert study.main([path]) == 2
    error = capsys.readouterr().err
    assert "Unknown loss 'squared'" in error
    last = error.splitlines()[-1]
    assert last == "Error: 1 of 2 runs failed, see above: pixel-squared-seed-1."
    (row,) = rows(tmp_path)
    values = {key: row[key] for key in ("run", "network", "loss")}
    assert [*values.values()] == ["pixel-cross_entropy-seed-1", "pixel", "cross_entropy"]
    page = (tmp_path / "study/study.html").read_text()
    assert "1 run missing: pixel-squared-seed-1" in page
    for label in ("accuracy (all pixels)", "balanced (with data)", "truth (with data)"):
        assert label in page
    assert "agreement with the truth" in page and "<h1>tiny</h1>" in page


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"budget": {}}, "budget: should be either epochs or seconds"),
        ({"budget": {"epochs": 1, "seconds": 1}}, "budget: should be either"),
        ({"budget": {"epochs": "many"}}, "budget: epochs: should be a number"),
        ({"budget": None}, "budget: Field required"),
        ({"seeds": []}, "seeds: .*at least 1 item"),
        ({"network": "unet"}, "network: Extra inputs"),
        ({"vary": {"network": []}}, "vary has no key, or a key without values"),
        ({"vary": {}}, "vary has no key"),
        ({"vary": [{"network": ["unet"]}, {"loss": []}]}, "a key without values"),
        ({"seeds": [1, 2, 1]}, "seeds has the same seed twice: 1"),
        ({"set": ["loss"]}, "set: Input should be a valid dictionary"),
        ({"vary": {"seed": [1]}}, "seed cannot be set or varied"),
        ({"set": {"epochs": 3}}, "epochs cannot be set or varied"),
        ({"vary": {"network": ["pixel", "pixel"]}}, "same combination twice: pixel"),
        (
            {"vary": [{"labels": ["none"]}, {"label_correction": ["none"]}]},
            "none would be the name of two combinations of vary, {'labels.*'label_corr.*: put one",
        ),
        ({"vary": {"network": ["pixle"]}}, "Unknown network 'pixle'"),
        ({"vary": {"loos": ["a"]}}, r"unknown key 'loos' \(similar: 'loss'\)"),
    ],
)
def test_mistakes_are_reported_before_a_run(write, tmp_path, capsys, changed, words):
    assert study.main([write(**changed)]) == 2
    assert re.search(words, capsys.readouterr().err)
    assert not (tmp_path / "study").exists()


def test_page_without_a_finished_run_is_an_error(write, tmp_path, capsys):
    assert study.main([write(), "--page-only"]) == 2
    assert f"No run in {tmp_path}/study/runs has finished" in capsys.readouterr().err


def test_groups_of_combinations_follow_one_another(write):
    found = study.read_study(write(vary=[
        {"network": ["unet"], "inference_mode": ["patches"]},
        {"network": ["pixel", "/a/mine.keras"], "precision": ["float32", "bfloat16"]},
    ]))  # fmt: skip
    assert [study.case_name(case) for case in found.cases] == [
        "unet-patches", "pixel-float32", "pixel-bfloat16", "mine-float32", "mine-bfloat16",
    ]  # fmt: skip


def test_budget_of_seconds_becomes_keys(write):
    found = study.read_study(write(budget={"seconds": "2.5"}))
    for _, run in study.plan(found, None).values():
        assert {"epochs=100000", "training_seconds=2.5"} < set(run.changes)


def test_option_set_fills_an_empty_set(write, tmp_path):
    with open(write(), "a") as file:
        file.write("set:\n")
    assert study.read_study(tmp_path / "tiny.yaml").set == {}
    assert study.read_study(tmp_path / "tiny.yaml", None, ["loss=a"]).set == {"loss": "a"}


@pytest.mark.parametrize(
    ("name", "reference"),  # what speeds are compared with
    [
        ("demo", {"network": "unet", "inference_mode": "patches"}),
        ("real", {"network": "unet", "inference_mode": "patches"}),
        ("full", {"network": "unet"}),
        ("networks", {"network": "unet"}),
        ("labels", {"network": "stem_2x2", "loss": "cross_entropy"}),
    ],
)
def test_studies_of_the_project_can_be_run(name, reference, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    found = study.read_study(f"target/study-{name}.yaml")
    assert len(found.seeds) >= 3
    assert len(study.plan(found, None)) == len(found.seeds) * len(found.cases)
    assert found.cases[0] == reference


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([(1, 0.5), (2, 0.6), (3, 0.4)], [(1, 0.5), (2, 0.6)]),
        ([(2, 0.6), (1, 0.6)], [(1, 0.6)]),
        ([(1, 0.5), (1, 0.7)], [(1, 0.7)]),
    ],
)
def test_pareto_front_has_no_point_that_another_dominates(points, expected):
    assert pareto_front(points) == expected


def test_spread_of_one_value_has_no_deviation():
    assert spread([3.0]) == (3.0, None)
    assert spread([1.0, 3.0]) == (2.0, np.sqrt(2))
