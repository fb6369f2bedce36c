import base64
import csv
import io
import json
import re
import shutil
import subprocess
import sys
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import HEIGHT, WIDTH, results, rows, start
from matplotlib.figure import Figure
from PIL import Image
from sklearn.metrics import roc_auc_score

from harness import REPOSITORY
from harness.data.mask_files import mask_files
from harness.inference.scores import SCORES, TARGET_ACCURACY
from harness.records import run as run_module
from harness.records.report import charts, one_run, pictures
from harness.records.results import target_text
from tools import report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
STYLE = (Path(charts.__file__).parent / "report.css").read_text()


@pytest.fixture
def run(finished, tmp_path):
    """The folder of a run that may be changed."""
    folder = tmp_path / "run"
    shutil.copytree(finished, folder, ignore=shutil.ignore_patterns("checkpoints", "*.keras"))
    return folder


def change(run, **values):
    """Change results.json."""
    (run / "results.json").write_text(json.dumps(results(run) | values))


def change_config(run, **values):
    values = {key: str(v) if isinstance(v, Path) else v for key, v in values.items()}
    change(run, config=results(run)["config"] | values)
    lines = (run / "config.yaml").read_text().splitlines()
    kept = [line for line in lines if line.partition(":")[0] not in values]
    new = [f"{key}: {json.dumps(value)}" for key, value in values.items()]
    (run / "config.yaml").write_text("\n".join(kept + new))


def write_table(path, table):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, table[0])
        writer.writeheader()
        writer.writerows(table)


def write_samples(run, n_gpus=0):
    """One sample per second over the run, by its MLPerf log."""
    lines = (run / "mlperf_cloudmask.log").read_text().splitlines()
    times = [json.loads(line.split(":::MLLOG ")[1])["time_ms"] / 1000 for line in lines]
    table = []
    for i in range(int(times[-1] - times[0]) + 2):
        row = {"time": times[0] + i, "cpu_percent": 150 + i % 7, "memory": 2e9 + i}
        row |= {"read_rate": 1e6, "write_rate": 2e5, "cpu_watts": ""}
        for gpu in range(n_gpus):
            row |= {f"gpu{gpu}_percent": 90 - gpu, f"gpu{gpu}_memory": 4e10, f"gpu{gpu}_watts": 300}
        table.append(row)
    write_table(run / "samples.csv", table)


class Page(HTMLParser):
    """The texts of a page; fails if its tags are not closed in order."""

    void = {"meta", "link", "img", "br"}

    def __init__(self, html):
        super().__init__()
        self.html, self.texts, self.stack = html, [], []
        self.feed(html)
        assert self.stack == []
        self.text = " ".join(" ".join(self.texts).split())
        found = re.findall(r'<script .*? data-scene="(.*?)">(.*?)</script>', html)
        self.scenes = {unescape(name): json.loads(data) for name, data in found}
        self.charts = re.findall(r'<div role="img" aria-label="(.*?)"', html)
        self.headings = re.findall(r"<h2>(.*?)</h2>", html)

    def handle_starttag(self, tag, attributes):
        if tag not in self.void:
            self.stack.append(tag)

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        if self.stack and self.stack[-1] not in ("style", "script"):
            self.texts.append(data)


def short(scene):
    """S3A_SL_1_RBT____20180601T004107_... as 'S3A 2018-06-01 00:41'."""
    return re.sub(r"^(S3.).{13}(\d{4})(\d\d)(\d\d)T(\d\d)(\d\d).*", r"\1 \2-\3-\4 \5:\6", scene)


def page_of(*runs, options=()):
    """Make a report in the first run's folder and read it."""
    file = runs[0] / "report.html"
    assert report.main([*map(str, runs), "-o", str(file), *map(str, options)]) == 0
    return Page(file.read_text(encoding="utf-8"))


# --- one run --------------------------------------------------------------------------------


def test_report_shows_metrics_baselines_facts_and_charts(run):
    write_samples(run, n_gpus=2)
    found, page = results(run), page_of(run)
    inference, training = found["inference"], found["training"]
    assert re.findall(r'<p class="large">([\d.]+)', page.html) == [
        f"{inference['accuracy']:.4f}",
        f"{inference['seconds_per_scene']:.3f}",
        f"{training['patches_per_second']:.1f}",
    ]
    cleared = [
        f"{inference[f'no_data_clear_{key}accuracy']:.4f}"
        for key in ("", "all_cloud_", "threshold_")
    ]
    assert "No data is clear mask {} all cloud {} threshold {}".format(*cleared) in page.text
    assert "accuracy, no data is clear {} {} {}".format(*cleared) in page.text
    for first, pixels in {"": "all pixels", "valid_": "pixels with data"}.items():
        mask, balanced, cloud, cold, cold_balanced = (
            f"{inference[first + key]:.4f}"
            for key in (
                "accuracy", "balanced_accuracy", "all_cloud_accuracy", "threshold_accuracy",
                "threshold_balanced_accuracy",
            )
        )  # fmt: skip
        bars = f"{pixels.capitalize()} mask {mask} all cloud {cloud} threshold {cold}"
        assert bars in page.text
        assert f" accuracy, {pixels} {mask} {cloud} {cold}" in page.text
        assert f"balanced, {pixels} {balanced} 0.5000 {cold_balanced}" in page.text
    n_bars = page.html.count('<div class="bar">')
    assert page.html.count(f'class="target" style="left:{100 * TARGET_ACCURACY}%"') == n_bars >= 5
    assert page.headings == [
        "Accuracy", "Seconds per scene", "Training patches per second", "Pictures", "Scores",
        "What ran where", "Training", "Times", "Machine",
    ]  # fmt: skip
    for text in (found["devices"]["description"], f"tensorflow {found['versions']['tensorflow']}",
                 found["git_commit"], "PATCH_SIZE 32 256", "batch_size 11 32",
                 f"Target {target_text(training, found['config'])}"):  # fmt: skip
        assert text in page.text
    assert "xla" not in page.text  # as in the reference workload
    assert page.charts == [
        "Accuracy of each scene", "Calibration", "ROC curve",
        "Training and validation loss", "Training and validation accuracy", "Seconds per epoch",
        "CPU [cores] over time", "memory [GB] over time", "files [MB/s] over time",
        "GPU [%] over time", "GPU memory [GB] over time", "power [W] over time",
    ]  # fmt: skip
    scenes = sorted(rows(run / "scenes.csv"), key=lambda row: float(row["accuracy"]))
    assert list(page.scenes) == [row["scene"] for row in scenes]
    titles = [
        f"{short(row['scene'])} {row['day_night']}, {float(row['accuracy']):.4f} ({place})"
        for row, place in zip(scenes, ("worst", "best"), strict=True)
    ]
    assert " ".join(titles) in page.text


def test_warnings_synthetic_scenes_and_baselines_of_training_are_shown(run):
    found = results(run)
    marked = {"synthetic": True, "baselines": {"all_cloud_accuracy": 0.4321}}
    change(
        run,
        warnings=["The network has learned nothing: every pixel is cloud."],
        training=found["training"] | marked,
        inference=found["inference"] | {"synthetic": True},
    )
    page = page_of(run)
    assert "Warning: The network has learned nothing" in page.text.split("Accuracy")[0]
    assert "Synthetic scenes: " in page.text.split("Accuracy")[0]
    assert "all cloud 0.4321" in page.text


def test_single_scene_is_neither_best_nor_worst(run):
    first, second = rows(run / "scenes.csv")
    write_table(run / "scenes.csv", [first])
    (run / "masks" / f"{second['scene']}.h5").unlink()
    page = page_of(run)
    assert list(page.scenes) == [first["scene"]]
    assert not re.search(r"\((best|worst|median)\)", page.text)


def test_more_scenes_are_drawn_on_request_and_get_files_of_their_own(run, monkeypatch):
    worst, best = sorted(rows(run / "scenes.csv"), key=lambda row: float(row["accuracy"]))
    monkeypatch.setattr(one_run, "MAX_SCENES", 1)
    monkeypatch.setattr(one_run, "PAGE_BYTES", 1)
    page = page_of(run)
    assert list(page.scenes) == [worst["scene"]] and "1 of 2 scenes" in page.text
    assert not (run / "report_scenes").exists()
    page = page_of(run, options=["--all-scenes"])
    assert list(page.scenes) == [worst["scene"]] and "1 of 2 scenes" not in page.text
    (file,) = (run / "report_scenes").iterdir()
    assert f'href="report_scenes/{file.name}"' in page.html
    own = Page(file.read_text())
    assert list(own.scenes) == [best["scene"]] and 'href="../report.html"' in own.html


def test_scene_tables_show_every_score_but_baselines_of_other_pixels(run):
    page, table = page_of(run), rows(run / "scenes.csv")
    elsewhere = {key for key, score in SCORES.items() if score.kind == "baseline"}
    elsewhere -= {"all_cloud_accuracy", "threshold_accuracy"}
    for row in table:
        cells = " ".join(
            score.show(float(row[key])) for key, score in SCORES.items() if key not in elsewhere
        )
        assert f"{short(row['scene'])} {row['day_night']} {cells}" in page.text
        assert f'title="{row["scene"]}"' in page.html
    for kind in ("day", "night"):
        values = [float(row["accuracy"]) for row in table if row["day_night"] == kind]
        assert f"{kind} {len(values)} {np.mean(values):.4f}" in page.text


def test_times_add_up_to_the_duration_of_the_run(run):
    training = results(run)["training"]
    change(run, training=training | {"input_seconds_per_epoch": [0.25, 0.125]}, seconds=50.0)
    text = page_of(run).text.split("The run part time ")[1].split("One scene")[0]
    names = ("waiting for data", "steps", "validation", "checkpoints", "writing", "inference")
    shown = [float(s) for s in re.findall(r"(-?[\d.]+(?:e-\d+)?) s\b", text)]
    assert "training: waiting for data 0.375 s" in text and all(name in text for name in names)
    assert sum(shown) == pytest.approx(50, abs=0.1)


def test_times_have_no_rest_where_parts_are_unknown_or_longer_than_the_run(run):
    change(run, seconds=0.5)
    assert "other: start" not in page_of(run).text
    change(run, training=None, inference=None, parts=[], seconds=9.0)
    assert "other: start" not in page_of(run).text


def test_scene_without_any_data_is_drawn(tmp_path):
    """The limits of its temperatures are 0 and 1, and no pixel has a colour."""
    missing = np.full((4, 5, 3), np.nan, np.float32)
    planes, drawn = pictures.draw(
        pictures.MaskedScene(np.zeros((4, 5), bool), None, None, missing, None, {})
    )
    assert [picture.title for picture in drawn] == ["False colour", "S9", "Mask"]
    assert "0 to 1 K" in drawn[1].note
    for picture in drawn[1:]:
        opacity = picture.colours[planes[picture.plane].codes][..., 3]
        assert (opacity == 0).all()


def test_calibration_agrees_with_scikit_learn(run):
    masks = mask_files(run)
    scenes = pictures.scenes_by_name(results(run)["config"]["inference_dir"])
    labels, probabilities = [], []
    for name in masks:
        with h5py.File(scenes[name]) as file:
            known = (np.nan_to_num(file["bts"][:]) != 0).all(axis=-1)
            labels.append(file["bayes"][..., 0][known] != 0)
        with h5py.File(masks[name]) as file:
            probabilities.append(file["probability"][:][known])
    labels, probabilities = np.concatenate(labels), np.concatenate(probabilities)
    text, (n_bins, n_roc) = page_of(run).text, (20, 1000)
    area = float(re.search(r"Area under the curve: ([\d.]+)\.", text)[1])
    assert area == pytest.approx(
        roc_auc_score(labels, (probabilities * n_roc).astype(int)), abs=6e-4
    )
    error = 0.0
    for i in range(n_bins):
        inside = (probabilities * n_bins).astype(int) == i
        if inside.sum() >= 100:
            error += abs(probabilities[inside].mean() - labels[inside].mean()) * inside.sum()
    shown = float(re.search(r"share of cloud: ([\d.]+)\.", text)[1])
    assert shown == pytest.approx(error / len(labels), abs=1.1e-3)


def draw(**values):
    """Draw a scene of 40 x 50 pixels, clear and 280 K where nothing else is given."""
    scene = {
        "mask": np.zeros((40, 50), bool), "label": None, "reflectances": None,
        "temperatures": np.full((40, 50, 3), 280, np.float32),
    }  # fmt: skip
    planes, found = pictures.draw(pictures.MaskedScene(**scene | values))
    colours = {
        each.title: each.colours[planes[each.plane].codes] if each.plane else each.colours
        for each in found
    }
    return planes, colours, {each.title: each.note for each in found}


def test_pictures_show_classes_and_values_and_are_transparent_without_data():
    rng = np.random.default_rng(0)
    mask, label = rng.random((2, 40, 50)) < 0.5
    temperatures = np.full((40, 50, 3), 280, np.float32)
    temperatures[:, 25:] = 220  # colder
    temperatures[:20, :5] = np.nan
    probability = np.where(mask, 0.75, 0.25)
    _, colours, notes = draw(
        mask=mask, label=label, temperatures=temperatures, probability=probability
    )
    measured = np.isfinite(temperatures[..., 0])
    assert list(colours) == ["False colour", "S9", "Label", "Mask", "Probability", "Differences"]
    for title, picture in colours.items():
        np.testing.assert_array_equal(picture[..., 3], 255 * measured, title)
    assert (colours["S9"][:, -1, :3] == 255).all() and (colours["S9"][-1, 0, :3] == 0).all()
    for title, cloud in {"Mask": mask, "Label": label}.items():
        expected = np.where(cloud[..., None], pictures.CLOUD, pictures.CLEAR)
        np.testing.assert_array_equal(colours[title][measured][:, :3], expected[measured])
    bright = colours["Probability"][..., :3].sum(axis=-1)
    assert bright[mask & measured].min() > bright[~mask & measured].max() > 0
    for colour, (a, b) in zip(
        pictures.DIFFERENCES.values(),
        ((True, True), (False, False), (True, False), (False, True)),
        strict=True,
    ):
        expected = (mask == a) & (label == b) & measured
        shown = (colours["Differences"] == (*colour, 255)).all(axis=-1)
        np.testing.assert_array_equal(shown, expected)
    assert f"{np.mean((mask != label)[measured]):.1%}" in notes["Differences"]


def test_uncertainty_is_dark_where_views_differ_and_hatched_where_there_is_one():
    uncertainty = np.tile(np.linspace(0, 1, 50), (40, 1))
    uncertainty[20:] = np.nan
    _, colours, _ = draw(uncertainty=uncertainty)
    np.testing.assert_array_equal(colours["Uncertainty"][..., 3] > 0, np.isfinite(uncertainty))
    grey = colours["Uncertainty"][0, :, 0].astype(int)
    assert (np.diff(grey) < 0).all() and (grey[0], grey[-1]) == (255, 0)


def test_planes_keep_values_to_half_a_step():
    rng = np.random.default_rng(0)
    temperatures = rng.uniform(200, 310, (40, 50, 3)).astype(np.float32)
    temperatures[..., 1] = temperatures[..., 2] + rng.uniform(-4, 8, (40, 50))
    temperatures[0] = np.nan
    positions = {
        "latitude": rng.uniform(-90, 90, (40, 50)), "longitude": rng.uniform(-180, 180, (40, 50))
    }  # fmt: skip
    planes, *_ = draw(
        temperatures=temperatures, positions=positions, probability=rng.random((40, 50))
    )
    for name, values, step in (
        ("S9", temperatures[..., 2], 0.5),
        ("S8-S9", temperatures[..., 1] - temperatures[..., 2], 0.1),
        ("latitude", positions["latitude"], 0.01),
        ("longitude", positions["longitude"], 0.01),
    ):
        plane, known = planes[name], np.isfinite(values)
        np.testing.assert_array_equal(plane.codes > 0, known, name)
        shown = plane.low + plane.step * plane.codes[known]
        np.testing.assert_allclose(shown, values[known], atol=0.501 * step, err_msg=name)
    assert set(planes) == {"classes", "S9", "S8-S9", "probability", "latitude", "longitude"}


def test_scenes_without_any_data_have_pictures():
    temperatures = np.full((40, 50, 3), np.nan, np.float32)
    _, colours, _ = draw(temperatures=temperatures, label=np.zeros((40, 50), bool))
    assert all((picture[..., 3] == 0).all() for picture in colours.values())


def test_false_colour_shows_s3_s2_s1_by_day():
    refs = np.zeros((40, 50, 3), np.float32)
    refs[:20], refs[20:] = (0.8, 0.4, 0.1), (0.1, 0.4, 0.8)  # S3, S2, S1
    refs[0, 0, 0] = np.nan
    _, colours, notes = draw(reflectances=refs)
    assert "day" in notes["False colour"]
    red, green, blue, _ = colours["False colour"][5, 5]
    assert red > green > blue and tuple(colours["False colour"][30, 5]) == (blue, green, red, 255)
    assert colours["False colour"][0, 0, 3] == 0


def test_reflectances_may_be_on_the_finer_grid(run):
    masks = mask_files(run)
    scenes = pictures.scenes_by_name(results(run)["config"]["inference_dir"])
    name = next(name for name in masks if "day" in scenes[name].parts)
    coarse = pictures.read_masked_scene(masks[name], scenes[name])
    fine = run / scenes[name].name
    shutil.copy(scenes[name], fine)
    with h5py.File(fine, "a") as file:
        refs = file["refs"][..., :3].repeat(2, axis=0).repeat(2, axis=1)  # S1 to S3 are enough
        del file["refs"]
        file["refs"] = refs
    found = pictures.read_masked_scene(masks[name], fine)
    assert found.reflectances.shape == (HEIGHT, WIDTH, 3)
    np.testing.assert_array_equal(found.reflectances, coarse.reflectances)


@pytest.fixture
def figures(monkeypatch):
    """The figures of the charts that a test draws."""
    found, savefig = [], Figure.savefig
    monkeypatch.setattr(
        Figure,
        "savefig",
        lambda f, *args, **kwargs: found.append(f) or savefig(f, *args, **kwargs),
    )
    return found


def test_chart_has_its_lines_the_diagonal_and_a_legend(figures):
    charts.chart("", "x", "y", {"network": ([0.1, 0.9], [0.2, 0.7])}, diagonal="perfect")
    (axes,), (legend,) = figures[0].axes, figures[0].legends
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert lines == {"network": [[0.1, 0.2], [0.9, 0.7]], "perfect": [[0, 0], [1, 1]]}
    assert [text.get_text() for text in legend.get_texts()] == ["network", "perfect"]


@pytest.mark.parametrize("length", [5, 15, 34, 60, 130])
def test_legend_is_as_wide_as_the_chart_at_most_and_above_it(figures, length):
    names = [f"{i}-" + "ab_de" * (length // 5) for i in range(4)]
    charts.chart("", "x", "y", {name: ([i], [i]) for i, name in enumerate(names)}, points=True)
    (axes,), (legend,) = figures[0].axes, figures[0].legends
    assert [text.get_text().replace("\n", "") for text in legend.get_texts()] == names
    box = legend.get_window_extent()
    assert 0 <= box.x0 and box.x1 <= figures[0].bbox.x1
    assert axes.bbox.y1 <= box.y0 + 1 and box.y1 <= figures[0].bbox.y1 + 1  # [pixels]
    assert axes.bbox.height > 0.6 * 2.5 * figures[0].dpi  # of the height without legend


def contrast(a, b):
    """Contrast of two colours by WCAG 2, from 1 to 21; hue has no part in it."""
    levels = np.array([a, b]) / 255
    linear = np.where(levels <= 0.04045, levels / 12.92, ((levels + 0.055) / 1.055) ** 2.4)
    low, high = sorted(linear @ (0.2126, 0.7152, 0.0722))
    return (high + 0.05) / (low + 0.05)


def rgb(text):
    digits = text[1:] if len(text) == 7 else "".join(2 * c for c in text[1:])
    return tuple(bytes.fromhex(digits))


def test_colours_can_be_told_apart_in_both_themes_and_without_colour_vision():
    cloud, clear, ours, label = pictures.DIFFERENCES.values()
    for pair in [(cloud, ours), (cloud, label), (clear, ours), (clear, label), (ours, label)]:
        assert contrast(*pair) >= 3
    assert contrast(pictures.CLEAR, pictures.CLOUD) >= 3
    for theme in re.findall(r":root \{(.*?)\}", STYLE, re.DOTALL):
        colours = {name: rgb(c) for name, c in re.findall(r"--(\w+): (#\w+)", theme)}
        for name in ("text", "soft", "accent", "good", "bad"):
            assert min(contrast(colours[name], colours[b]) for b in ("page", "card")) >= 4.5, name
        for series in charts.SERIES:
            assert contrast(rgb(series), colours["page"]) >= 3, series


def test_long_series_are_drawn_as_means_that_ignore_nan(monkeypatch):
    monkeypatch.setattr(charts, "MAX_POINTS", 100)
    values = np.arange(1000.0)
    values[:10] = np.nan
    values[11] = np.nan
    thin = charts.thin(values)
    assert len(thin) == 100 and np.isnan(thin[0])
    assert thin[1] == np.mean([10, *range(12, 20)]) and thin[-1] == np.mean(values[990:])
    assert list(charts.thin([1, 2])) == [1, 2]
    assert charts.thin(np.zeros((950, 3))).shape == (95, 3)


# --- partial, damaged and hostile runs ------------------------------------------------------


def make_partial(run, kind, tmp_path):
    """Damage a run; return texts that its page has and has not."""
    table = rows(run / "scenes.csv")
    if kind == "train only":
        change(run, mode="train", inference=None)
        shutil.rmtree(run / "masks")
        (run / "scenes.csv").unlink()
        return ["No scenes were masked.", "Validation patches"], ["Pictures", "worst"]
    if kind == "inference only":
        change(run, mode="inference", training=None)
        (run / "history.csv").unlink()
        return ["Nothing was trained.", "(worst)"], ["Validation patches"]
    if kind == "aborted while masking":
        change(run, status="aborted", error="OSError: disk <full>\nsecond line", inference=None)
        (run / "scenes.csv").unlink()
        mean = np.mean([float(row["accuracy"]) for row in table])
        return [
            "aborted", r"Error: OSError: disk <full>\nsecond line", "Inference did not finish.",
            "scores are those of the 2 masks so far", "(worst)", f"mask {mean:.4f}",
        ], []  # fmt: skip
    if kind == "starting":
        for path in run.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        (run / "results.json").write_text('{"status": "starting", "mode": "train", "parts": []}')
        return ["starting", "had not ended"], ["Settings", "Pictures"]
    if kind == "resumed, with bad scenes":
        part = {"start": "2026-01-01T00:00:00+00:00", "status": "aborted", "seconds": 61.0}
        bad = {"path": "/x/S3A_bad.hdf", "reason": "it is truncated", "during": "training"}
        change(run, parts=[part, part | {"status": "success"}], bad_scenes=[bad])
        return [
            "aborted after 1 min 1 s, success after 1 min 1 s", "inference (last part)",
            "Bad scenes file reason during /x/S3A_bad.hdf it is truncated training",
        ], []  # fmt: skip
    if kind == "no labels":
        data = tmp_path / "unlabelled"
        shutil.copytree(results(run)["config"]["inference_dir"], data)
        for path in data.rglob("*.hdf"):
            with h5py.File(path, "a") as file:
                del file["bayes"]
        change_config(run, inference_dir=data)
        kept = {"scene", "day_night", "seconds", "cloud_fraction"}
        unscored = [{k: v if k in kept else "" for k, v in row.items()} for row in table]
        write_table(run / "scenes.csv", unscored)
        change(run, inference=results(run)["inference"] | dict.fromkeys(SCORES))
        return ["The scenes have no labels.", "Scenes"], ["worst", "Area under"]
    if kind == "scene files gone":
        change_config(run, inference_dir="/nowhere")
        return ["No pictures: no scene files in /nowhere", "Scenes"], ["worst"]
    if kind == "damaged mask":
        path = run / "masks" / f"{table[0]['scene']}.h5"
        path.write_bytes(path.read_bytes()[:1000])
        return ["Pictures and calibration lack 1 scene", path.name], []
    if kind == "samples cut off":
        write_samples(run)
        with (run / "samples.csv").open("a") as file:
            file.write("17955661")
        return ["Machine"], []
    change(run, devices=results(run)["devices"] | {"deterministic": {}, "replicas": 1e308})
    history = rows(run / "history.csv")
    write_table(run / "history.csv", [history[0] | {"val_loss": "1e308"}, history[1]])
    write_table(run / "scenes.csv", [table[0] | {"accuracy": "nan", "f1": "inf"}, *table[1:]])
    return ["–"], ["nan", "inf ", "Deterministic"]


@pytest.mark.parametrize(
    "kind",
    [
        "train only", "inference only", "aborted while masking", "starting",
        "resumed, with bad scenes", "no labels", "scene files gone", "damaged mask",
        "samples cut off", "odd numbers",
    ],
)  # fmt: skip
def test_report_of_a_partial_or_damaged_run(run, finished, tmp_path, kind):
    present, absent = make_partial(run, kind, tmp_path)
    page = page_of(run)
    for text in present:
        assert text in page.text
    for text in absent:
        assert text not in page.text
    page_of(run, finished)  # next to a finished run


def test_scenes_other_than_those_that_were_masked_are_not_shown(run, dataset, tmp_path, capsys):
    shutil.copytree(dataset / "ssts", tmp_path / "ssts")
    first, second = sorted((tmp_path / "ssts").rglob("S3A*.hdf"))
    with h5py.File(first, "a") as file:
        file["bayes"][:, :20] = 1 - file["bayes"][:, :20]
    change_config(run, inference_dir="/nowhere")
    page = page_of(run, options=["--data", tmp_path / "ssts"])
    assert f"{first} is not the file that was masked" in page.text
    assert "data of 1 scene." in page.text and list(page.scenes) == [second.stem]
    options = ["--data", str(tmp_path / "ssts"), "--pictures", str(tmp_path / "figures")]
    assert report.main([str(run), *options]) == 2
    assert f"{first} is not the file that was masked" in capsys.readouterr().err


EVIL = "<script>window.evil=1</script>\"'><img src=http://evil.example/x onerror=evil=1>"


def make_evil(run):
    """A run all of whose names and texts try to become a part of the page."""
    table = rows(run / "scenes.csv")
    first, name = table[0]["scene"], "S3A" + EVIL.replace("/", "∕")
    (run / "masks" / f"{first}.h5").rename(run / "masks" / f"{name}.h5")
    write_table(run / "scenes.csv", [table[0] | {"scene": name, "day_night": EVIL}, table[1]])
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
        network={EVIL: EVIL},
        versions={EVIL: EVIL},
        devices=found["devices"] | {"description": EVIL},
        config=found["config"] | {"platform": EVIL, EVIL: EVIL},
        training=found["training"] | {"best_epoch": EVIL, "epochs_run": EVIL},
        warnings=[EVIL],
        bad_scenes=[{"path": EVIL, "reason": EVIL, "during": EVIL}],
        parts=[{"start": EVIL, "status": EVIL}] * 2,
    )
    evil = run.with_name(EVIL.replace("/", "∕"))
    run.rename(evil)
    return evil


def test_names_and_texts_from_files_stay_texts(run, finished):
    evil = make_evil(run)
    for page in (page_of(evil, finished), page_of(evil)):
        assert page.html.count("<script>") == 1
        assert "<img src=http" not in page.html and "\u202e" not in page.html
        assert "<script>window.evil=1<" in page.text  # as text
    assert page.text.count("http://evil.example") >= 10 and r"\u202e\n" in page.text
    assert len(page.scenes) == 1  # the other one has no name of a scene


def test_page_of_one_scene_keeps_texts_as_texts(run, monkeypatch):
    monkeypatch.setattr(one_run, "PAGE_BYTES", 1)
    evil = run.rename(run.with_name(EVIL.replace("/", "∕")))
    assert len(page_of(evil).scenes) == 1
    (file,) = (evil / "report_scenes").iterdir()
    own = Page(file.read_text())
    assert len(own.scenes) == 1 and own.html.count("<script>") == 1


# --- several runs ---------------------------------------------------------------------------


def test_report_of_several_runs_shows_results_curves_and_differences(run, finished, tmp_path):
    change_config(run, learning_rate=0.5)
    change(run, git_commit="0123456789abcdef")
    third = tmp_path / "third"
    shutil.copytree(run, third)
    (third / "history.csv").unlink()
    change(third, status="aborted", inference=None, training=None)
    page = page_of(run, finished, third)
    assert "3 runs" in page.text
    # Two runs have the name 'run': the table shows their folders.
    assert f"folder {run} {finished} third status success success aborted" in page.text
    assert re.search(r"epochs \d+ \d+ –", page.text)
    accuracy, f1 = (results(run)["inference"][key] for key in ("accuracy", "f1"))
    assert f"{accuracy:.4f}" in page.text and f"{f1:.4f}" in page.text
    section = page.text.split("Differences")[1]
    assert "config.learning_rate" in section and "git_commit 0123456789abcdef" in section
    assert "batch_size" not in section and "versions." not in section
    assert page.charts == [
        "Accuracy, all pixels", "Accuracy, no data is clear", "Accuracy, pixels with data",
        "validation loss", "validation accuracy",
    ]  # fmt: skip
    assert (
        "the runs repeat one another" in page_of(finished_copy(finished, tmp_path), finished).text
    )


def finished_copy(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "copy"))


# --- the command and the run ----------------------------------------------------------------


def test_one_png_per_masked_scene(run, tmp_path):
    assert report.main([str(run), "--pictures", str(tmp_path / "figures")]) == 0
    names = {row["scene"] for row in rows(run / "scenes.csv")}
    files = list((tmp_path / "figures").iterdir())
    assert {path.name for path in files} == {f"{name}.png" for name in names}
    for path in files:
        with Image.open(path) as image:
            assert image.format == "PNG" and image.text["Title"] == path.stem
            colours = {c for _, c in image.convert("RGB").getcolors(image.width * image.height)}
        assert colours >= {*pictures.DIFFERENCES.values(), pictures.CLEAR, pictures.CLOUD}
    assert not (run / "report.html").exists()


def make_fault(fault, run):
    """Do what should end in one line; return arguments and a part of that line."""
    mask, drawing = next((run / "masks").glob("*.h5")), [str(run), "--pictures", str(run / "png")]
    if fault == "no run":
        return [str(run / "masks")], "Name the folder of a run."
    if fault == "damaged results":
        (run / "results.json").write_text('{"status": ')
        return [str(run)], "results.json should be that of a run"
    if fault == "damaged table":
        (run / "scenes.csv").write_text("scene,accuracy\nS3A\n")
        return [str(run)], "scenes.csv has 2 columns, but row 1"
    if fault == "output is a folder":
        return [str(run), "-o", str(run)], f"{run} is a folder"
    if fault == "no folder --data":
        return [str(run), "--data", "/nowhere"], "No directory /nowhere"
    if fault == "pictures without masks":
        shutil.rmtree(run / "masks")
        return drawing, "No masks in"
    if fault == "pictures without scenes":
        change_config(run, inference_dir="/nowhere")
        return drawing, "2 of 2 masked scenes are not in"
    if fault == "pictures of a damaged mask":
        mask.write_bytes(mask.read_bytes()[:1000])
        return drawing, f"{mask} cannot be used"
    with h5py.File(mask, "a") as file:
        del file["mask"]
        file["mask"] = h5py.ExternalLink("/etc/passwd", "/mask")
    return drawing, "link out of the file"


@pytest.mark.parametrize(
    "fault",
    [
        "no run", "damaged results", "damaged table", "output is a folder", "no folder --data",
        "pictures without masks", "pictures without scenes", "pictures of a damaged mask",
        "linked mask",
    ],
)  # fmt: skip
def test_faults_end_in_one_line(run, capsys, fault):
    arguments, reason = make_fault(fault, run)
    assert report.main(arguments) == 2
    (line,) = (s for s in capsys.readouterr().err.splitlines() if s.startswith("Error: "))
    assert reason in line
    assert not (run / "report.html").exists() and not list(run.rglob("*.part*"))


def test_missing_package_is_named_with_the_command_that_installs_it(run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert report.main([str(run)]) == 2
    error = capsys.readouterr().err
    assert "matplotlib" in error and "pip install -r requirements.txt" in error


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["a", "b", "-o", "x.html", "--data", "d"], "omit --data and --all-scenes"),
        (["a", "b", "-o", "x.html", "--all-scenes"], "omit --data and --all-scenes"),
        (["a", "--pictures", "d", "-o", "x.html"], "writes no page: omit -o"),
    ],
)
def test_options_that_would_be_ignored_are_usage_errors(capsys, arguments, expected):
    with pytest.raises(SystemExit, match="2"):
        report.main(arguments)
    assert expected in capsys.readouterr().err


def test_several_runs_need_an_output_file(run, capsys):
    for arguments in ([run, run], [run, run, "--pictures", "x"]):
        with pytest.raises(SystemExit) as stop:
            report.main(list(map(str, arguments)))
        assert stop.value.code == 2 and "-o" in capsys.readouterr().err


def test_report_imports_neither_tensorflow_nor_pyplot(run):
    code = (
        "import sys; import tools.report\n"
        "assert not {'matplotlib', 'jinja2', 'PIL', 'h5py', 'numpy'} & set(sys.modules)\n"
        "assert tools.report.main(sys.argv[1:]) == 0\n"
        "assert not {'tensorflow', 'matplotlib.pyplot'} & set(sys.modules)\n"
    )
    answer = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, str(run)],
        capture_output=True, text=True, cwd=REPOSITORY, check=False,
        env={**subprocess.os.environ, "PYTHONPATH": str(REPOSITORY / "tools")},
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr
    assert answer.stderr == f"Report: {run / 'report.html'}\n"


def test_run_makes_its_report_or_warns_in_one_line(run, caplog):
    assert run_module.make_report(run) == run / "report.html"
    before = (run / "report.html").read_bytes()
    (run / "scenes.csv").write_text("scene,accuracy\nS3A\n")
    caplog.clear()
    assert run_module.make_report(run) is None
    (record,) = caplog.records
    assert record.levelname == "WARNING" and "No report.html: " in record.getMessage()
    assert (run / "report.html").read_bytes() == before


@pytest.mark.slow
def test_failing_report_leaves_the_run_successful(tmp_path, settings, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    done = start(tmp_path / "out", settings | {"report": True, "epochs": 1})
    assert done.status == 0 and results(done.folder)["status"] == "success"
    assert not (done.folder / "report.html").exists()


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
    """A function that opens a page; a request to the network or a message of the page fails."""
    contexts, faults = [], []

    def open_page(file, width=1200, scheme="light", **options):
        context = chromium.new_context(
            viewport={"width": width, "height": 800}, color_scheme=scheme, **options
        )
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: faults.append(message.text))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("request", lambda r: faults.extend([r.url] * (r.url[:5] not in ("file:", "data:"))))
        page.goto(file.as_uri())
        return page

    open_page.faults = faults
    yield open_page
    for context in contexts:
        context.close()
    assert faults == []


def in_browser(test):
    no_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
    return pytest.mark.browser(no_browser(test))


@in_browser
def test_scenes_are_sorted_by_click_and_by_keyboard(run, opened):
    table = rows(run / "scenes.csv")[:1] * 3
    values = [("0.95", "10"), ("nan", "9"), ("0.1", "100")]
    table = [
        row | {"scene": f"S3A_{i}", "accuracy": accuracy, "seconds": seconds}
        for i, (row, (accuracy, seconds)) in enumerate(zip(table, values, strict=True))
    ]
    write_table(run / "scenes.csv", table)
    page_of(run)
    page = opened(run / "report.html")

    def column(name):
        n = page.locator("[aria-label=Scenes] th button").all_text_contents().index(name) + 1
        return page.locator(f"[aria-label=Scenes] tbody tr > :nth-child({n})").all_text_contents()

    def sort():
        return page.eval_on_selector_all(
            "[aria-label=Scenes] th[aria-sort]",
            "c => c.map(h => [h.textContent.trim(), h.ariaSort])",
        )

    assert column("accuracy") == ["0.1000", "0.9500", "–"] and sort() == [["accuracy", "ascending"]]
    page.click("[aria-label=Scenes] th button:text-is('accuracy')")
    assert column("accuracy") == ["0.9500", "0.1000", "–"]  # without a number: last in both orders
    assert sort() == [["accuracy", "descending"]]
    page.locator("[aria-label=Scenes] th button:text-is('seconds')").focus()
    page.keyboard.press("Enter")
    assert column("seconds") == ["9.00", "10.00", "100.00"] and sort() == [["seconds", "ascending"]]
    page.click("[aria-label=Scenes] th button:text-is('scene')")
    assert column("scene") == ["S3A_0", "S3A_1", "S3A_2"]


def open_viewer(opened, file, **options):
    """Open a page whose picture fits on the screen; returns it when the picture is drawn."""
    page = opened(file, **options)
    page.wait_for_selector("#viewer input")
    page.evaluate("document.querySelector('.view').scrollIntoView({block: 'center'})")
    return page


def place_of(page, row, col):
    """Where a pixel of the whole scene is on the screen."""
    box = page.locator(".view").bounding_box()
    return box["x"] + (col + 0.5) / WIDTH * box["width"], box["y"] + (row + 0.5) / HEIGHT * box[
        "height"
    ]


def values_at(page, *place):
    """The row and column that the page shows at a place on the screen, and its whole text."""
    page.mouse.move(*place)
    text = page.inner_text("output")
    return [int(n) for n in re.match(r"row (\d+), column (\d+)", text).groups()], text


def shown_part(page):
    """First row, first column, last row and last column in view."""
    return [n for corner in ((0, 0), (HEIGHT - 1, WIDTH - 1))
            for n in values_at(page, *place_of(page, *corner))[0]]  # fmt: skip


@in_browser
def test_viewer_shows_the_values_and_colours_of_the_files(run, opened):
    data = shutil.copytree(results(run)["config"]["inference_dir"], run.parent / "data")
    change_config(run, inference_dir=data)
    worst, best = sorted(rows(run / "scenes.csv"), key=lambda row: float(row["accuracy"]))
    for row in (worst, best):
        with h5py.File(next(data.rglob(f"{row['scene']}.hdf")), "a") as file:
            file["latitude"], file["longitude"] = np.mgrid[:HEIGHT, :WIDTH] / 8.0
    page_of(run)
    page = open_viewer(opened, run / "report.html")
    page.click(f"a[data-scene='{best['scene']}']")
    page.wait_for_selector(".view[aria-label*='(best)']")  # it is drawn
    with h5py.File(next(data.rglob(f"{best['scene']}.hdf"))) as file:
        bts, label = np.nan_to_num(file["bts"][:]), file["bayes"][..., 0] != 0
    with h5py.File(run / "masks" / f"{best['scene']}.h5") as file:
        mask, probability = file["mask"][:] != 0, file["probability"][:]
    measured = (bts != 0).all(axis=-1)
    page.evaluate("document.querySelector('.view').scrollIntoView({block: 'center'})")
    words = {False: "clear", True: "cloud"}
    for place in [*np.argwhere(measured)[::1500], *np.argwhere(~measured)[::900]]:
        row, col = map(int, place)
        shown, text = values_at(page, *place_of(page, row, col))
        assert shown == [row, col]
        has_data = measured[row, col]
        assert ("no data" in text) == (not has_data)
        assert f"mask {words[mask[row, col]]} · label {words[label[row, col]]}" in text
        assert f"latitude {row / 8:.2f}° · longitude {col / 8:.2f}°" in text
        pattern = r"S9 ([\d.]+) K · S8−S9 ([-\d.]+) K · probability ([\d.]+)"
        numbers = [float(n) for n in re.search(pattern, text).groups()] if has_data else []
        _, bt_11um, bt_12um = bts[row, col].astype(float)
        expected = [bt_12um, bt_11um - bt_12um, probability[row, col]]
        assert all(
            abs(n - e) <= atol
            for n, e, atol in zip(numbers, expected, (0.3, 0.11, 0.011), strict=False)
        ), (numbers, expected)
    colours = {}
    for title in ("False colour", "S9", "Label", "Mask", "Probability", "Differences"):
        page.check(f"input[value='{title}']")
        png = page.evaluate("document.querySelector('canvas').toDataURL()").partition(",")[2]
        colours[title] = np.array(Image.open(io.BytesIO(base64.b64decode(png))))
        known = bts[..., 2] != 0 if title == "S9" else measured
        np.testing.assert_array_equal(colours[title][..., 3], 255 * known, title)
    for title, cloud in {"Label": label, "Mask": mask}.items():
        expected = np.where(cloud[..., None], pictures.CLOUD, pictures.CLEAR)
        np.testing.assert_array_equal(colours[title][measured][:, :3], expected[measured], title)


@in_browser
def test_viewer_zooms_and_moves_by_mouse_and_keyboard(run, opened):
    page_of(run)
    page = open_viewer(opened, run / "report.html")
    whole = [0, 0, HEIGHT - 1, WIDTH - 1]
    assert shown_part(page) == whole
    wheel = "new WheelEvent('wheel', {deltaY: -100, cancelable: true})"
    assert page.evaluate(f"document.querySelector('.view').dispatchEvent({wheel})")
    assert shown_part(page) == whole  # without a click the wheel scrolls the page
    place = place_of(page, 30, 40)
    page.mouse.click(*place)
    page.mouse.wheel(0, -250)
    page.wait_for_selector("canvas[style*='scale(1.7']")
    assert values_at(page, *place)[0] == [30, 40]
    first_row, first_col, last_row, last_col = shown_part(page)
    assert 0 < first_row < 30 < last_row < HEIGHT - 1 and 0 < first_col < 40 < last_col < WIDTH - 1
    page.mouse.move(*place)
    page.mouse.down()
    page.mouse.move(place[0] + 90, place[1] - 60, steps=3)
    page.mouse.up()
    assert values_at(page, place[0] + 90, place[1] - 60)[0] == [30, 40]
    page.click("text=Whole scene")
    assert shown_part(page) == whole

    def centre():
        return [int(n) for n in re.findall(r"\d+", page.inner_text("output"))[:2]]

    page.focus(".view")
    page.keyboard.press("+")
    assert centre() == [HEIGHT // 2, WIDTH // 2]
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowUp")
    row, col = centre()
    assert row < HEIGHT // 2 and col > WIDTH // 2
    for _ in range(30):
        page.keyboard.press("ArrowRight")
    assert shown_part(page)[3] == WIDTH - 1  # the picture cannot leave the view
    page.focus(".view")
    page.keyboard.press("0")
    assert shown_part(page) == whole
    page.click("text=Zoom in")
    assert shown_part(page)[0] > 0
    page.click("text=Zoom out")
    assert shown_part(page) == whole


@in_browser
def test_viewer_zooms_by_touch_and_other_scenes_have_pages_of_their_own(run, opened, monkeypatch):
    monkeypatch.setattr(one_run, "PAGE_BYTES", 1)
    page_of(run)
    page = open_viewer(opened, run / "report.html", width=390, is_mobile=True, has_touch=True)
    page.click("a[href^='report_scenes/']")
    page.wait_for_selector("#viewer input")
    assert "report_scenes" in page.url and page.locator("option").count() == 1
    (x0, y0), (x1, y1) = place_of(page, 40, 50), place_of(page, 60, 80)
    page.touchscreen.tap(x0, y0)
    assert page.inner_text("output").startswith("row 40, column 50 ·")
    touch = page.context.new_cdp_session(page)
    for kind, grow in (("touchStart", 0), ("touchMove", 20), ("touchMove", 60), ("touchEnd", None)):
        points = (
            [{"x": x0 - grow, "y": y0, "id": 1}, {"x": x1 + grow, "y": y1, "id": 2}]
            if grow is not None else []
        )  # fmt: skip
        touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
    page.touchscreen.tap(x0, y0)
    row, col = (int(n) for n in re.findall(r"\d+", page.inner_text("output"))[:2])
    assert col > 52  # around the middle of the fingers, the 65th column
    page.click("text=Report of the run")
    page.wait_for_url("**/report.html")


@in_browser
@pytest.mark.parametrize("width", [390, 1400])
def test_tables_fit(run, opened, width):
    page_of(run)
    page = opened(run / "report.html", width=width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    widths = page.eval_on_selector_all(
        ".wide", "all => all.map(e => [e.ariaLabel, e.scrollWidth - e.clientWidth])"
    )
    scrolled = {name for name, more in widths if more > 0}
    assert scrolled <= (set() if width == 1400 else {"Scenes", "Means over scenes"})


@in_browser
@pytest.mark.parametrize("kind", ["several", "aborted", "evil"])
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
    small = page.eval_on_selector_all(
        "svg text", "all => all.map(t => t.getBoundingClientRect().height).filter(h => h < 9)"
    )
    assert small == []  # [pixels]: legible


@in_browser
def test_page_follows_the_theme_and_prints_light_with_all_scenes(run, opened):
    table = rows(run / "scenes.csv")
    write_table(run / "scenes.csv", [table[0] | {"scene": f"S3A_{i}"} for i in range(200)])
    page_of(run)

    def colours(page):
        """Of the page, its text and the text of charts."""
        style = "getComputedStyle(document.querySelector('{}')).{}"
        places = ("body", "backgroundColor"), ("body", "color"), ("svg text", "fill")
        return [page.evaluate(style.format(*place)) for place in places]

    light = ["rgb(255, 255, 255)", *["rgb(27, 36, 48)"] * 2]
    assert colours(opened(run / "report.html")) == light
    page = opened(run / "report.html", scheme="dark")
    assert colours(page) == ["rgb(17, 22, 29)", *["rgb(230, 235, 241)"] * 2]
    on_screen = page.evaluate("document.querySelector('[aria-label=Scenes]').clientHeight")
    page.emulate_media(media="print", color_scheme="dark")
    assert colours(page) == light
    assert (
        page.evaluate("document.querySelector('[aria-label=Scenes]').clientHeight") > 4 * on_screen
    )


@in_browser
def test_no_script_runs_but_that_of_the_page(run, opened):
    page_of(run)
    file = run / "report.html"
    foreign_code = "<script>window.evil = 1</script><img src='x' onerror='window.evil = 1'>"
    file.write_text(file.read_text().replace("</main>", f"{foreign_code}</main>"))
    page = opened(file)
    assert page.evaluate("window.evil") is None
    refused = [fault for fault in opened.faults if "Content Security Policy" in fault]
    assert len(refused) >= 3 and refused == opened.faults  # script, picture, handler
    opened.faults.clear()
