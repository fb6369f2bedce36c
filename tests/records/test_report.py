import csv
import errno
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import h5py
import numpy as np
import pytest
from conftest import HEIGHT, WIDTH, results, rows
from PIL import Image
from sklearn.calibration import calibration_curve
from sklearn.metrics import roc_auc_score

from harness import REPOSITORY
from harness.data.mask_files import mask_files
from harness.records.report import charts, pictures
from harness.records.report import one_run as report_run
from harness.records.saved_runs import read_run
from tools import report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture
def run(finished, tmp_path):
    """The folder of a run that may be changed."""
    folder = tmp_path / "run"
    shutil.copytree(finished, folder, ignore=shutil.ignore_patterns("checkpoints", "*.keras"))
    return folder


def change(run, **values):
    """Change what results.json says."""
    (run / "results.json").write_text(json.dumps(results(run) | values))


def change_config(run, **values):
    values = {key: str(v) if isinstance(v, Path) else v for key, v in values.items()}
    change(run, config=results(run)["config"] | values)
    lines = [
        line
        for line in (run / "config.yaml").read_text().splitlines()
        if line.partition(":")[0] not in values
    ]
    lines += [f"{key}: {json.dumps(value)}" for key, value in values.items()]
    (run / "config.yaml").write_text("\n".join(lines))


def write_scenes(run, table):
    with (run / "scenes.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, table[0])
        writer.writeheader()
        writer.writerows(table)


def write_samples(run, n_gpus=0, pause=0):
    """A sample a second over the run, by its MLPerf log; a pause in the middle [s]."""
    begin, *_, end = times_of(run)
    table = []
    for i in range(int(end - begin) + 2):
        row = {"time": begin + i + pause * (i > 5), "cpu_percent": 150 + i % 7, "memory": 2e9 + i}
        row |= {"read_rate": 1e6, "write_rate": 2e5, "cpu_watts": ""}
        for gpu in range(n_gpus):
            row |= {f"gpu{gpu}_percent": 90 - gpu, f"gpu{gpu}_memory": 4e10, f"gpu{gpu}_watts": 300}
        table.append(row)
    with (run / "samples.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, table[0])
        writer.writeheader()
        writer.writerows(table)


def times_of(run):
    lines = (run / "mlperf_cloudmask.log").read_text().splitlines()
    return [json.loads(line.split(":::MLLOG ")[1])["time_ms"] / 1000 for line in lines]


class Page(HTMLParser):
    """What a page says, tag by tag."""

    void = {"meta", "link", "img", "br"}

    def __init__(self, html):
        super().__init__()
        self.html, self.texts, self.stack = html, [], []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        if tag not in self.void:
            self.stack.append(tag)

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag  # all is closed, in order

    def handle_data(self, data):
        if self.stack and self.stack[-1] not in ("style", "script"):
            self.texts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())

    @property
    def charts(self):
        return re.findall(r'<svg .*?aria-label="(.*?)"', self.html)

    @property
    def headings(self):
        return re.findall(r"<h2>(.*?)</h2>", self.html)


def page_of(*runs, options=()):
    """Make a report in the first run's folder and read it."""
    file = runs[0] / "report.html"
    assert report.main([*map(str, runs), "-o", str(file), *map(str, options)]) == 0
    page = Page(file.read_text(encoding="utf-8"))
    assert page.stack == []
    return page


# --- one run --------------------------------------------------------------------------------


def test_report_begins_with_both_metrics_and_the_baselines(run):
    found = results(run)
    page = page_of(run)
    large = re.findall(r'<p class="large">\s*([\d.]+)', page.html)
    inference, training = found["inference"], found["training"]
    assert large == [
        f"{inference['accuracy']:.3f}",
        f"{inference['seconds_per_scene']:.3f}",
        f"{training['patches_per_second']:.1f}",
    ]
    for key in ("valid_accuracy", "all_cloud_accuracy", "threshold_accuracy"):
        assert f"<b>{inference[key]:.4f}</b>" in page.html
    assert "Target: 0.9" in page.text and page.html.count('class="mark" style="left:90.0%"') == 5
    assert page.headings == [
        "Accuracy", "Seconds per scene", "Training", "What ran where", "Training",
        "Where the time went", "Pictures", "Scores", "Scenes", "The machine",
    ]  # fmt: skip
    for text in (found["devices"]["description"], f"tensorflow {found['versions']['tensorflow']}",
                 f"{found['git_commit']}", "PATCH_SIZE 32 256", "batch_size 11 32"):  # fmt: skip
        assert text in page.text
    assert "train_split 0.75 0.8" in page.text and "xla" not in page.text


def test_report_draws_what_the_run_left(run):
    write_samples(run, n_gpus=2)
    page = page_of(run)
    assert page.charts == [
        "loss of training and validation, epoch by epoch",
        "accuracy of training and validation, epoch by epoch",
        "seconds of each epoch",
        "accuracy of each scene over the share of cloud in its label",
        "share of cloud over the probability that the network gives",
        "true positive rate over false positive rate",
        "CPU [cores] over time", "memory [GB] over time", "files [MB/s], cache included over time",
        "GPU [%] over time", "GPU memory [GB] over time", "power [W] over time",
    ]  # fmt: skip
    assert page.html.count("<img ") == 2 * 5  # two scenes: the worst and the best
    assert "Worst scene" in page.text and "Best scene" in page.text


def test_charts_take_their_colours_from_the_page_and_share_no_names(run):
    write_samples(run, n_gpus=1)
    html = page_of(run).html
    svgs = re.findall(r"<svg .*?</svg>", html, re.DOTALL)
    assert len(svgs) == 12
    for svg in svgs:
        ElementTree.fromstring(svg)
        colours = set(re.findall(r"(?:fill|stroke): ([^;\"]+)", svg))
        assert colours <= {"none", *charts.COLOURS.values()}, colours
    ids = re.findall(r'\bid="([^"]*)"', html)
    assert len(ids) == len(set(ids)) > 0
    links = set(re.findall(r'(?:href="|url\()#([^")]*)', html))
    assert links == set(ids)


def test_day_and_night_stand_apart(run):
    page = page_of(run)
    table = rows(run / "scenes.csv")
    for kind in ("day", "night"):
        values = [float(row["accuracy"]) for row in table if row["day_night"] == kind]
        assert f"{kind} {len(values)} {np.mean(values):.4f}" in page.text


def test_time_adds_up_to_that_of_the_run(run):
    change(run, training=results(run)["training"] | {"input_seconds_per_epoch": [0.25, 0.125]})
    parts = dict(report_run.time_parts(read_run(run)))
    assert parts["training: waiting for data"] == 0.375
    assert sum(parts.values()) == pytest.approx(results(run)["seconds"])
    assert "waiting for data" in page_of(run).text


def test_times_known_of_the_last_part_alone_say_so(run):
    change(run, parts=[{"status": "aborted"}, {"status": "success"}])
    found = report_run.time_parts(read_run(run))
    assert [what for what, _ in found if "part" in what] == [
        "setting up: tracing, compiling (last part)", "inference (last part)",
    ]  # fmt: skip


def test_report_tells_what_the_run_used_up(run):
    sampling = {"energy_joules": 9e6, "gpu_energy_joules": 8000.0, "cpu_energy_joules": None}
    change(run, sampling=sampling | {"read_bytes": 163e9, "cpu_seconds": 7500})
    text = page_of(run).text
    for words in (
        "energy 2.50 kWh",
        "Energy of GPUs 8.0 kJ",
        "Read, cache included 163.0 GB",
        "2 h 5 min",
    ):
        assert words in text
    assert "Energy of CPUs" not in text


def test_reduced_pictures_keep_the_share_of_each_class():
    rng = np.random.default_rng(0)
    mask, label = rng.random((2, 600, 750)) < 0.5
    temperatures = np.full((600, 750, 3), 280, np.float32)
    temperatures[:, 375:] = 220  # colder
    temperatures[:300, :30] = np.nan
    scene = pictures.MaskedScene(mask, label, None, temperatures)
    whole, small = pictures.panels(scene), pictures.panels(scene, 200)
    assert [panel.pixels.shape for panel in small] == [(150, 187, 3)] * 5  # every fourth pixel
    for panels in (whole, small):
        _, bt, bayes, ours, differ = (panel.pixels for panel in panels)
        n_rows, n_cols = bt.shape[:2]
        assert (bt[:, -1] == 255).all() and (bt[-1, n_cols // 4] == 0).all()  # cold is bright
        corner = {tuple(pixel) for pixel in bt[: n_rows // 4, : n_cols // 30].reshape(-1, 3)}
        assert corner == set(pictures.STRIPES)
        cloud = {"bayes": (bayes == 255).all(axis=-1), "ours": (ours == 255).all(axis=-1)}
        for (name, colour), (a, b) in zip(
            pictures.DIFFERENCES.items(),
            ((True, True), (False, False), (True, False), (False, True)),
            strict=True,
        ):
            expected = (cloud["ours"] == a) & (cloud["bayes"] == b)
            np.testing.assert_array_equal((differ == colour).all(axis=-1), expected, name)
            assert expected.mean() == pytest.approx(0.25, abs=0.02)
    np.testing.assert_array_equal(whole[3].pixels[..., 0] == 255, mask)
    assert f"{np.mean(mask != label):.1%}" in whole[4].note


def test_false_colour_shows_s3_s2_s1_by_day():
    refs = np.zeros((40, 50, 3), np.float32)
    refs[:20], refs[20:] = (0.8, 0.4, 0.1), (0.1, 0.4, 0.8)  # S3, S2, S1
    bts = np.full((40, 50, 3), 280, np.float32)
    clear = np.zeros((40, 50), bool)
    panel = pictures.panels(pictures.MaskedScene(clear, None, refs, bts))[0]
    assert "day" in panel.title
    red, green, blue = panel.pixels[5, 5]
    assert red > green > blue and tuple(panel.pixels[30, 5]) == (blue, green, red)


def contrast(a, b):
    """Contrast of two colours by WCAG 2, from 1 to 21; hue has no part in it."""
    levels = np.array([a, b]) / 255
    linear = np.where(levels <= 0.04045, levels / 12.92, ((levels + 0.055) / 1.055) ** 2.4)
    low, high = sorted(linear @ (0.2126, 0.7152, 0.0722))
    return (high + 0.05) / (low + 0.05)


def test_errors_of_a_mask_are_told_by_brightness_alone():
    cloud, clear, ours, label = pictures.DIFFERENCES.values()
    for agreement in (cloud, clear):
        assert contrast(agreement, ours) >= 3 and contrast(agreement, label) >= 3
    assert contrast(ours, label) >= 3 and contrast(pictures.CLEAR, pictures.CLOUD) >= 3


def test_calibration_agrees_with_scikit_learn(run):
    masks = mask_files(run)
    scenes = pictures.scenes_by_name(results(run)["config"]["inference_dir"])
    notes = []
    found = report_run.calibration({n: (masks[n], scenes[n]) for n in masks}, notes, set())
    labels, probabilities = [], []
    for name in masks:
        with h5py.File(scenes[name]) as file:
            known = (np.nan_to_num(file["bts"][:]) != 0).all(axis=-1)
            labels.append(file["bayes"][..., 0][known] != 0)
        with h5py.File(masks[name]) as file:
            probabilities.append(file["probability"][:][known])
    labels, probabilities = np.concatenate(labels), np.concatenate(probabilities)
    # A rank within a bin of 0.001 is not kept: that may cost a little where many are alike.
    rounded = (probabilities * report_run.BINS).astype(int)
    assert found["auc"] == pytest.approx(roc_auc_score(labels, rounded), abs=1e-9)
    assert found["auc"] == pytest.approx(roc_auc_score(labels, probabilities), abs=5e-3)
    counts = report_run.histogram(labels, probabilities)
    bins = counts.reshape(2, report_run.RELIABILITY_BINS, -1).sum(axis=2)
    shares, _ = calibration_curve(labels, probabilities, n_bins=report_run.RELIABILITY_BINS)
    np.testing.assert_allclose((bins[1] / bins.sum(axis=0))[bins.sum(axis=0) > 0], shares)
    assert found["scenes"] == 2 and notes == []


def test_phases_come_from_the_mlperf_log(run):
    phases = report_run.read_phases(run / "mlperf_cloudmask.log")
    kinds = [kind for kind, _, _ in phases]
    assert kinds == ["training", "validation"] * 2 + ["inference"]
    history = rows(run / "history.csv")
    for i, row in enumerate(history):
        (_, begin, _), (_, _, end) = phases[2 * i : 2 * i + 2]
        assert end - begin == pytest.approx(float(row["seconds"]), abs=0.5)
    log = (run / "mlperf_cloudmask.log").read_text()
    cut = log[: log.index('"eval_start"') + 30]  # in the middle of a line
    (run / "mlperf_cloudmask.log").write_text(cut)
    assert report_run.read_phases(run / "mlperf_cloudmask.log") == phases[:1]
    (run / "mlperf_cloudmask.log").write_text(log[: log.index('"eval_start"')])
    assert report_run.read_phases(run / "mlperf_cloudmask.log")[0][0] == "training"


def test_a_day_between_two_parts_does_not_fill_the_charts(run, monkeypatch):
    write_samples(run, pause=86400)
    drawn = []
    monkeypatch.setattr(charts, "over_time", lambda axes, times, **_: drawn.append(times))
    report_run.machine_charts(read_run(run))
    n = len(rows(run / "samples.csv"))
    assert len(drawn) == 3 and drawn[0][-1] == pytest.approx(
        (n - 2 + report_run.LONGEST_GAP) / 60, abs=0.02
    )


def test_many_gpus_are_drawn_as_mean_and_extremes():
    lines = {f"GPU{i}": np.array([i, 10.0]) for i in range(8)}
    few = report_run.few(lines)
    assert [list(line) for line in few.values()] == [[3.5, 10], [0, 10], [7, 10]]
    assert report_run.few(dict(list(lines.items())[:3])).keys() == {"GPU0", "GPU1", "GPU2"}


def test_thinned_means_leave_nan_out():
    values = np.arange(1000.0)
    values[:10] = np.nan
    values[11] = np.nan
    thin = charts.thinned(values, 100)
    assert len(thin) == 100 and np.isnan(thin[0])
    assert thin[1] == np.mean([10, *range(12, 20)]) and thin[-1] == np.mean(values[990:])
    assert list(charts.thinned([1, 2], 100)) == [1, 2]


# --- runs that are not whole ----------------------------------------------------------------


def make_partial(run, kind, tmp_path):
    """Make the run what is left of one; return texts that the page has and has not."""
    if kind == "train only":
        change(run, mode="train", inference=None)
        shutil.rmtree(run / "masks")
        (run / "scenes.csv").unlink()
        return ["No scenes were masked.", "validation, best epoch"], ["Pictures", "Each scene"]
    if kind == "inference only":
        change(run, mode="inference", training=None)
        (run / "history.csv").unlink()
        return ["Nothing was trained.", "Worst scene"], ["validation, best epoch", "epoch by epoch"]
    if kind == "aborted while masking":
        change(run, status="aborted", error="OSError: disk <full>\nsecond line", inference=None)
        (run / "scenes.csv").unlink()
        return [
            "aborted", r"Error: OSError: disk <full>\nsecond line", "No inference was finished.",
            "scores are those of the 2 masks so far", "Worst scene",
        ], []  # fmt: skip
    if kind == "starting":
        for path in run.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        (run / "results.json").write_text('{"status": "starting", "mode": "train", "parts": []}')
        return ["starting", "had not ended"], ["All settings", "Pictures"]
    if kind == "resumed, with bad scenes":
        part = {"start": "2026-01-01T00:00:00+00:00", "status": "aborted", "seconds": 61.0}
        bad = {"path": "/x/S3A_bad.hdf", "reason": "it is truncated", "during": "training"}
        change(run, parts=[part, part | {"status": "success"}], bad_scenes=[bad])
        return ["The run was resumed", "1 min 1 s", "1 bad scene", "/x/S3A_bad.hdf it is trunc"], []
    if kind == "no labels":
        data = tmp_path / "unlabelled"
        shutil.copytree(results(run)["config"]["inference_dir"], data)
        for path in data.rglob("*.hdf"):
            with h5py.File(path, "a") as file:
                del file["bayes"]
        change_config(run, inference_dir=data)
        kept = {"scene", "day_night", "seconds", "cloud_fraction"}
        table = rows(run / "scenes.csv")
        write_scenes(run, [{k: v if k in kept else "" for k, v in r.items()} for r in table])
        scores = {k: None for k in results(run)["inference"] if "accuracy" in k or len(k) == 2}
        change(run, inference=results(run)["inference"] | scores)
        return ["The scenes have no labels.", "Our mask", "Each scene"], [
            "Bayesian mask cloud", "Worst scene", "Pixels of all scenes", "Area under",
        ]  # fmt: skip
    if kind == "scene files gone":
        change_config(run, inference_dir="/nowhere")
        return ["No pictures: there are no scene files in /nowhere", "Each scene"], ["Worst scene"]
    if kind == "damaged mask":
        path = run / "masks" / f"{rows(run / 'scenes.csv')[0]['scene']}.h5"
        path.write_bytes(path.read_bytes()[:1000])
        return [f"No pictures of {path.stem}", "1 scene(s) are missing in the calibration"], []
    table = rows(run / "history.csv")
    text = (run / "history.csv").read_text().replace(table[1]["val_loss"], "nan")
    (run / "history.csv").write_text(text)
    table = rows(run / "scenes.csv")
    write_scenes(run, [table[0] | {"accuracy": "nan", "f1": "inf"}, *table[1:]])
    return ["–"], ["nan", "inf "]


@pytest.mark.parametrize(
    "kind",
    [
        "train only", "inference only", "aborted while masking", "starting",
        "resumed, with bad scenes", "no labels", "scene files gone", "damaged mask", "NaN",
    ],
)  # fmt: skip
def test_report_of_what_is_left_of_a_run(run, tmp_path, kind):
    present, absent = make_partial(run, kind, tmp_path)
    page = page_of(run)
    for text in present:
        assert text in page.text
    for text in absent:
        assert text not in page.text


def test_scene_files_may_be_elsewhere(run, dataset):
    change_config(run, inference_dir="/nowhere")
    assert "Worst scene" in page_of(run, options=["--data", dataset / "ssts"]).text


def test_values_of_another_kind_are_left_out(run, finished):
    change(run, devices=results(run)["devices"] | {"deterministic": {}})
    text = (run / "history.csv").read_text()
    value = rows(run / "history.csv")[0]["val_loss"]
    (run / "history.csv").write_text(text.replace(value, "1e308"))
    for page in (page_of(run), page_of(run, finished)):
        assert "Bit for bit" not in page.text and "epoch by epoch" in " ".join(page.charts)


def test_samples_of_a_run_that_crashed_are_drawn(run):
    write_samples(run)
    with (run / "samples.csv").open("a") as file:
        file.write("17955661")
    assert "CPU [cores] over time" in page_of(run).charts


def test_scenes_that_were_not_masked_are_told_and_left_out(run, dataset, tmp_path, capsys):
    shutil.copytree(dataset / "ssts", tmp_path / "ssts")
    first, second = sorted((tmp_path / "ssts").rglob("S3A*.hdf"))
    with h5py.File(first, "a") as file:
        file["bayes"][:, :20] = 1 - file["bayes"][:, :20]
    page = page_of(run, options=["--data", tmp_path / "ssts"])
    assert f"1 scene(s) are not those that were masked ({first.stem} for one)" in page.text
    assert "data of 1 scene(s)" in page.text and page.html.count("<img ") == 5
    assert f'<p class="name">{second.stem}</p>' in page.html
    options = ["--data", str(tmp_path / "ssts"), "--pictures", str(tmp_path / "figures")]
    assert report.main([str(run), *options]) == 2
    assert f"{first} is not the file that was masked" in capsys.readouterr().err


EVIL = "<script>window.evil=1</script>\"'><img src=http://evil.example/x onerror=evil=1>"


def make_evil(run):
    """A run whose every name and text tries to become a part of the page."""
    table = rows(run / "scenes.csv")
    first = table[0]["scene"]
    name = "S3A" + EVIL.replace("/", "∕")
    (run / "masks" / f"{first}.h5").rename(run / "masks" / f"{name}.h5")
    write_scenes(run, [table[0] | {"scene": name, "day_night": EVIL}, table[1]])
    data = run.parent / "data"
    shutil.copytree(results(run)["config"]["inference_dir"], data)
    scene = next(data.rglob(f"{first}.hdf"))
    scene.rename(scene.with_name(f"{name}.hdf"))
    change_config(run, inference_dir=data)
    found = results(run)
    change(
        run,
        status=EVIL,
        error=EVIL + "\u202e\n",
        git_commit=EVIL,
        versions={EVIL: EVIL},
        devices=found["devices"] | {"description": EVIL},
        config=found["config"] | {"platform": EVIL, EVIL: EVIL},
        bad_scenes=[{"path": EVIL, "reason": EVIL, "during": EVIL}],
        parts=[{"start": EVIL, "status": EVIL}] * 2,
    )
    evil = run.with_name(EVIL.replace("/", "∕"))
    run.rename(evil)
    return evil


def test_names_and_texts_stay_texts(run, finished):
    evil = make_evil(run)
    for page in (page_of(evil), page_of(evil, finished)):
        assert page.html.count("<script>") == 1
        assert "<img src=http" not in page.html and "\u202e" not in page.html
        assert "<script>window.evil=1<" in page.text  # as text
    page = page_of(evil)
    assert page.text.count("http://evil.example") >= 10 and r"\u202e\n" in page.text
    assert page.html.count("<img ") == 10  # the scene of that name is shown too


def test_a_thousand_scenes_make_a_small_page(run):
    table = rows(run / "scenes.csv")
    rng = np.random.default_rng(0)
    many = [
        table[i % 2]
        | {
            "scene": f"S3A_SL_1_RBT____20191001T{i:06d}" + table[0]["scene"][31:],
            "accuracy": f"{rng.random():.6f}",
        }
        for i in range(970)
    ]
    write_scenes(run, many)
    page = page_of(run)
    assert len(page.html) < 1.5e6
    assert len(re.findall(r'<th scope="row">S3A', page.html)) == 970
    assert "day 485" in page.text and "night 485" in page.text


# --- several runs ---------------------------------------------------------------------------


def test_several_runs_stand_side_by_side(run, finished, tmp_path):
    change_config(run, learning_rate=0.5)
    change(run, git_commit="0123456789abcdef")
    third = tmp_path / "third"
    shutil.copytree(run, third)
    (third / "history.csv").unlink()
    change(third, status="aborted", inference=None, training=None)
    page = page_of(run, finished, third)
    assert "3 runs" in page.text
    # Two runs are named 'run': they go by their folders.
    assert f"{run} success" in page.text and f"{finished} success" in page.text
    assert "third aborted – –" in page.text
    section = page.text.split("What differs")[1]
    assert "config.learning_rate" in section and "git_commit 0123456789abcdef" in section
    assert "batch_size" not in section and "versions." not in section
    assert page.charts == [
        "accuracy of each run beside its baselines",
        "validation loss of each run, epoch by epoch",
        "validation accuracy of each run, epoch by epoch",
    ]


def test_untrained_run_stands_beside_a_trained_one(run, finished):
    (run / "history.csv").unlink()
    change(run, training=None)
    page = page_of(run, finished)
    assert "validation loss of each run, epoch by epoch" in page.charts
    assert ">training</text>" not in page.html  # of several runs validation only


def test_curves_of_many_runs_have_room(finished, tmp_path):
    runs = [tmp_path / f"20260101T0000{i:02d}Z-12345" for i in range(10)]
    for folder in runs:
        folder.mkdir()
        for name in ("results.json", "history.csv"):
            shutil.copy(finished / name, folder)
    page = page_of(*runs)  # a warning of matplotlib would be an error
    heights = [float(box.split()[-1]) for box in re.findall(r'viewBox="([^"]*)"', page.html)]
    assert len(heights) == 3 and min(heights[1:]) > 300  # ten rows of legend and 200 points
    assert page.html.count(">20260101T000003Z-12345</text>") == 3


def test_names_of_runs_lose_what_they_share():
    assert charts.short_names(["/x/a1/run", "/x/a2/run"]) == ["a1/run", "a2/run"]
    assert charts.short_names(["20260101T0", "20260102T0"]) == ["20260101T0", "20260102T0"]
    assert charts.short_names(["x", "x-", "x-1"]) == ["x", "x-", "x-1"]
    assert charts.short_names(["/x/one"]) == ["/x/one"]
    assert charts.short_names(["x-", "x-1"]) == ["x-", "1"]


def test_run_may_have_a_name_that_matplotlib_cannot_draw(run, finished):
    run = run.rename(run.with_name("雲"))
    assert "雲</text>" in page_of(run, finished).html


def test_runs_that_repeat_one_another_differ_in_nothing(run, finished):
    assert "the runs repeat one another" in page_of(run, finished).text


# --- pictures -------------------------------------------------------------------------------


def test_pictures_of_all_masked_scenes(run, tmp_path):
    assert report.main([str(run), "--pictures", str(tmp_path / "figures")]) == 0
    names = {row["scene"] for row in rows(run / "scenes.csv")}
    files = list((tmp_path / "figures").iterdir())
    assert {path.name for path in files} == {f"{name}.png" for name in names}
    for path in files:
        with Image.open(path) as image:
            assert image.format == "PNG" and image.width == 2160
            assert image.text["Title"] == path.stem
            found = {
                colour for _, colour in image.convert("RGB").getcolors(image.width * image.height)
            }
        assert found >= {*pictures.DIFFERENCES.values(), pictures.CLEAR, pictures.CLOUD}
    assert not (run / "report.html").exists()


def test_reflectances_may_be_on_the_finer_grid(run):
    masks = mask_files(run)
    scenes = pictures.scenes_by_name(results(run)["config"]["inference_dir"])
    name = next(name for name in masks if "day" in scenes[name].parts)
    coarse = pictures.read_masked_scene(masks[name], scenes[name])
    fine = run / scenes[name].name
    shutil.copy(scenes[name], fine)
    with h5py.File(fine, "a") as file:
        refs = file["refs"][:].repeat(2, axis=0).repeat(2, axis=1)
        del file["refs"]
        file["refs"] = refs
    found = pictures.read_masked_scene(masks[name], fine)
    assert found.reflectances.shape == (HEIGHT, WIDTH, 3)
    np.testing.assert_array_equal(found.reflectances, coarse.reflectances)


# --- what goes wrong ------------------------------------------------------------------------


def spoil(what, run):
    """Do what should end in one line; return arguments and a part of that line."""
    mask = next((run / "masks").glob("*.h5"))
    if what == "no run":
        return [str(run / "masks")], "Name the folder of a run."
    if what == "damaged results":
        (run / "results.json").write_text('{"status": ')
        return [str(run)], "results.json should be that of a run"
    if what == "a run named twice":
        return [str(run), f"{run}/../run", "-o", str(run / "report.html")], "named twice"
    if what == "damaged table":
        (run / "scenes.csv").write_text("scene,accuracy\nS3A\n")
        return [str(run)], "scenes.csv"
    if what == "a folder to write":
        return [str(run), "-o", str(run)], f"-o takes a file to write, found the folder {run}."
    if what == "no folder --data":
        return [str(run), "--data", "/nowhere"], "No directory /nowhere"
    if what == "pictures without masks":
        shutil.rmtree(run / "masks")
        return [str(run), "--pictures", str(run / "figures")], "No masks in"
    if what == "pictures without scenes":
        change_config(run, inference_dir="/nowhere")
        return [str(run), "--pictures", str(run / "figures")], "2 of 2 masked scenes are not in"
    if what == "pictures of a damaged mask":
        mask.write_bytes(mask.read_bytes()[:1000])
        return [str(run), "--pictures", str(run / "figures")], f"{mask} cannot be used"
    with h5py.File(mask, "a") as file:
        del file["mask"]
        file["mask"] = h5py.ExternalLink("/etc/passwd", "/mask")
    return [str(run), "--pictures", str(run / "figures")], "link out of the file"


@pytest.mark.parametrize(
    "what",
    [
        "no run", "a run named twice", "damaged results", "damaged table", "no folder --data",
        "a folder to write",
        "pictures without masks",
        "pictures without scenes", "pictures of a damaged mask", "linked mask",
    ],
)  # fmt: skip
def test_bad_input_ends_in_one_line(run, capsys, what):
    arguments, reason = spoil(what, run)
    assert report.main(arguments) == 2
    (line,) = (s for s in capsys.readouterr().err.splitlines() if s.startswith("Error: "))
    assert reason in line
    assert not (run / "report.html").exists() and not list(run.rglob("*.part*"))


@pytest.mark.parametrize("package", ["matplotlib", "jinja2", "PIL"])
def test_missing_package_is_told_with_the_line_to_type(run, monkeypatch, capsys, package):
    monkeypatch.setitem(sys.modules, package, None)
    assert report.main([str(run)]) == 2
    error = capsys.readouterr().err
    assert package in error and "pip install -r requirements-tools.txt" in error


def test_full_disk_leaves_the_earlier_report(run, monkeypatch):
    page_of(run)
    before = (run / "report.html").read_bytes()

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device", "report.html")

    monkeypatch.setattr(Path, "replace", full)
    assert report.main([str(run)]) == 2
    assert (run / "report.html").read_bytes() == before and not list(run.rglob("*.part*"))


def test_several_runs_need_a_file_to_write(run, capsys):
    for arguments in ([run, run], [run, run, "--pictures", "x"]):
        with pytest.raises(SystemExit) as stop:
            report.main(list(map(str, arguments)))
        assert stop.value.code == 2 and "-o" in capsys.readouterr().err


def test_the_program_needs_no_tensorflow(run):
    code = (
        "import sys; sys.argv = ['report.py', *sys.argv[1:]]\n"
        "import tools.report\n"
        "assert not {'matplotlib', 'jinja2', 'PIL'} & set(sys.modules)\n"
        "assert tools.report.main() == 0\n"
        "assert 'tensorflow' not in sys.modules\n"
    )
    answer = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, str(run)],
        capture_output=True, text=True, cwd=REPOSITORY, timeout=120, check=False,
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr
    assert answer.stderr == f"The report is {run / 'report.html'}\n"


# --- in a browser ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chromium():
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(chromium):
    """A function that opens a file; whatever the page asks of the network, or complains of, fails.

    What Chromium itself asks for is not the page's.
    """
    contexts, faults = [], []

    def open_page(file, width=1200, scheme="light", **options):
        context = chromium.new_context(
            viewport={"width": width, "height": 800}, color_scheme=scheme, **options
        )
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: faults.append(message.text))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("request", lambda request: faults.extend(foreign(request.url)))
        page.goto(file.as_uri())
        return page

    open_page.faults = faults
    yield open_page
    for context in contexts:
        context.close()
    assert faults == []


def foreign(url):
    return [] if url.startswith(("file:", "data:")) else [url]


def in_browser(test):
    no_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
    return pytest.mark.browser(no_browser(test))


def shown_order(page, column):
    return page.eval_on_selector_all(
        f".tall tbody tr > :nth-child({column})", "cells => cells.map(c => c.textContent.trim())"
    )


@in_browser
def test_table_is_sorted_by_click_and_by_keyboard(run, opened):
    table = rows(run / "scenes.csv")
    more = [
        table[0] | {"scene": f"S3A_{i}", "accuracy": accuracy, "seconds": seconds}
        for i, (accuracy, seconds) in enumerate([("0.95", "10"), ("nan", "9"), ("0.1", "100")])
    ]
    write_scenes(run, table + more)
    page_of(run)
    page = opened(run / "report.html")
    accuracies = sorted(f"{float(row['accuracy']):.4f}" for row in table) + ["0.9500"]
    assert shown_order(page, 3) == ["0.1000", *accuracies, "–"]

    def sorts():
        return page.eval_on_selector_all(
            ".tall th[aria-sort]", "c => c.map(h => [h.textContent.trim(), h.ariaSort])"
        )

    assert sorts() == [["accuracy", "ascending"]]
    page.click(".tall th button:text-is('accuracy')")
    assert shown_order(page, 3) == [*reversed(["0.1000", *accuracies]), "–"]
    assert sorts() == [["accuracy", "descending"]]

    heading = page.locator(".tall th button:text-is('seconds')")
    heading.focus()
    page.keyboard.press("Enter")
    seconds = [float(text) for text in shown_order(page, 13)]
    assert seconds == sorted(seconds) and seconds[-1] == 100  # as numbers, not as texts
    assert sorts() == [["seconds", "ascending"]]
    page.keyboard.press("Space")
    assert [float(text) for text in shown_order(page, 13)] == seconds[::-1]
    page.keyboard.press("Shift+Tab")  # to the heading before
    page.keyboard.press("Enter")
    assert sorts() == [["cloud in mask", "ascending"]]
    page.click(".tall th button:text-is('scene')")
    names = shown_order(page, 1)
    assert names == sorted(names) and len(names) == 5
    # The scene without accuracy is the second now: it comes last again, either way.
    page.click(".tall th button:text-is('accuracy')")
    assert shown_order(page, 3) == ["0.1000", *accuracies, "–"]
    page.click(".tall th button:text-is('accuracy')")
    assert shown_order(page, 3) == [*reversed(["0.1000", *accuracies]), "–"]


@in_browser
@pytest.mark.parametrize("kind", ["one", "several", "aborted", "evil"])
def test_page_fits_a_phone(run, finished, tmp_path, opened, kind):
    write_samples(run, n_gpus=5)
    others = []
    if kind == "evil":
        run = make_evil(run)
    elif kind == "aborted":
        make_partial(run, "aborted while masking", tmp_path)
        change(run, error="x" * 2000)
    elif kind == "several":
        others = [tmp_path / ("n" * 150 + str(i)) for i in range(7)]
        for other in others:
            shutil.copytree(finished, other)
    page_of(run, *others)
    page = opened(run / "report.html", width=360, is_mobile=True, has_touch=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert page.evaluate("window.evil") is None
    shapes = page.eval_on_selector_all("img", "all => all.map(i => [i.complete, i.naturalWidth])")
    assert all(shape == [True, WIDTH] for shape in shapes)
    small = page.eval_on_selector_all(
        "svg text", "all => all.map(t => t.getBoundingClientRect().height).filter(h => h < 9)"
    )
    assert small == []  # [pixels]: can be read


@in_browser
def test_page_is_dark_where_the_reader_wants_it(run, opened):
    page_of(run)
    script = """() => {
        const probe = document.body.appendChild(document.createElement("i"));
        const found = {};
        for (const name of ["page", "card", "text", "soft", "accent", "good", "bad", "band",
                            "series-1", "series-2", "series-3", "series-4"]) {
            probe.style.color = `var(--${name})`;
            found[name] = getComputedStyle(probe).color.match(/\\d+/g).map(Number);
        }
        found.body = getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number);
        return found;
    }"""
    for scheme in ("light", "dark"):
        colours = opened(run / "report.html", scheme=scheme).evaluate(script)
        page = colours["page"]
        assert colours["body"] == page and (sum(page) < 120) == (scheme == "dark")
        for background in (page, colours["card"]):
            for name in ("text", "soft", "accent", "good", "bad"):
                assert contrast(colours[name], background) >= 4.5, (scheme, name)
        for i in range(1, 5):
            assert contrast(colours[f"series-{i}"], colours["band"]) >= 3, (scheme, i)


@in_browser
def test_page_prints_with_all_scenes_and_light(run, opened):
    table = rows(run / "scenes.csv")
    write_scenes(run, [table[0] | {"scene": f"S3A_{i}"} for i in range(200)])
    page_of(run)
    page = opened(run / "report.html", scheme="dark")
    on_screen = page.evaluate("document.querySelector('.tall').clientHeight")
    pdf = page.pdf(format="A4")
    assert pdf.startswith(b"%PDF") and len(re.findall(rb"/Type\s*/Page\b", pdf)) > 4
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("document.querySelector('.tall').clientHeight") > 4 * on_screen
    colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert colour == "rgb(255, 255, 255)"


@in_browser
def test_nothing_but_the_pages_own_script_runs(run, opened):
    page_of(run)
    file = run / "report.html"
    foreign_code = "<script>window.evil = 1</script><img src='x' onerror='window.evil = 1'>"
    file.write_text(file.read_text().replace("</main>", f"{foreign_code}</main>"))
    page = opened(file)
    assert page.evaluate("window.evil") is None
    refused = [fault for fault in opened.faults if "Content Security Policy" in fault]
    assert len(refused) >= 3 and refused == opened.faults  # script, picture, handler
    opened.faults.clear()
