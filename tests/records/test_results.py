"""The numbers that a run reports, from rows and clocks with known values."""

import threading
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import HEIGHT, WIDTH

import data_loader
import slstr_cloud
from harness.config import Config
from harness.console import progress
from harness.inference.scores import MEAN_SCORES, SCENE_COLUMNS
from harness.preflight import results_bytes
from harness.records import results
from harness.training.state import TrainingState


def row_of_epoch(epoch, train_seconds=10.0):
    numbers = dict.fromkeys(("loss", "accuracy", "val_loss", "val_accuracy"), 0.5)
    return {
        **numbers, "epoch": epoch, "seconds": train_seconds + 2, "train_seconds": train_seconds,
        "input_seconds": 1.0, "patches_per_second": 60 / train_seconds,
    }  # fmt: skip


@pytest.fixture
def clock(monkeypatch):
    """A clock of slstr_cloud that stands still; a call moves it on and returns the value given."""

    def wait(seconds, value=None):
        wait.now += seconds
        return value

    wait.now = 100.0
    monkeypatch.setattr(slstr_cloud, "active_seconds", lambda: wait.now)
    return wait


def test_times_of_an_epoch_add_up_over_its_steps_and_parts(clock):
    firsts = []
    board = SimpleNamespace(profiled=lambda steps, first: firsts.append(first) or steps)
    trainer = SimpleNamespace(train_step=lambda batch: clock(3.0), first_bad_step=lambda: 0)
    feed = (clock(2.0) for _ in range(9))
    # Resumed in the third epoch, after two of its five steps.
    state = TrainingState([row_of_epoch(1), row_of_epoch(2)], 2, seconds=20.0, input_seconds=7.0)
    slstr_cloud.train_epoch(
        SimpleNamespace(board=board), trainer, SimpleNamespace(n_steps=5), feed, state
    )
    assert (state.step, state.seconds, state.input_seconds) == (5, 20 + 3 * 5, 7 + 3 * 2)
    assert firsts == [2 * 5 + 2 + 1]  # the next step of the training, counted from 1


NO_CLOUD = np.zeros((HEIGHT, WIDTH), np.float32)


def mask_scenes(settings, predict, write, n_scenes=2):
    """Mask scenes with one device; functions take the place of its network and of the masks."""

    class Predictor:
        padding, device = ((0, 0), (0, 0)), "CPU:0"

        def __call__(self, scene):
            return predict()

    slstr_cloud.mask_scenes(
        Config.model_validate(settings),
        SimpleNamespace(rank=0),
        SimpleNamespace(mode="benchmark", part=0),
        SimpleNamespace(
            take=iter, check_finite=lambda path, probability: None,
            write=lambda *written: write(written[-1]) or 0.0,
        ),
        None,
        data_loader.find_scenes(settings["inference_dir"])[:n_scenes],
        Predictor(),
    )  # fmt: skip


def test_time_of_a_scene_is_split_into_its_parts(clock, settings):
    rows = []
    mask_scenes(settings, lambda: clock(5.0, (NO_CLOUD, 4.0, None)), rows.append, n_scenes=1)
    (row,) = rows
    seconds = {key: value for key, value in row.items() if key.endswith("seconds")}
    assert seconds == {
        "seconds": 5, "read_seconds": 0, "network_seconds": 4, "stitch_seconds": 1,
        "score_seconds": 0,
    }  # fmt: skip


def test_scene_is_written_while_the_network_has_the_next_one(settings):
    calls, second = [], threading.Event()

    def predict():
        calls.append("network")
        if len(calls) == 2:
            second.set()
        return NO_CLOUD, 1.0, None

    def write(row):
        calls.append("write" if second.wait(60) else "nobody came")

    mask_scenes(settings, predict, write)
    assert calls == ["network", "network", "write", "write"]


def test_scene_is_written_although_the_next_one_fails(settings):
    rows = []

    def predict():
        if started.is_set():
            second.set()
            raise MemoryError("the second scene")
        started.set()
        return NO_CLOUD, 1.0, None

    started, second = threading.Event(), threading.Event()
    with pytest.raises(MemoryError, match="the second scene"):
        mask_scenes(settings, predict, lambda row: second.wait(60) and rows.append(row))
    assert len(rows) == 1


@pytest.mark.parametrize("n_scenes", [1, 2])
def test_error_while_a_mask_is_written_ends_the_masking(settings, n_scenes):
    def write(row):
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        mask_scenes(settings, lambda: (NO_CLOUD, 1.0, None), write, n_scenes)


@pytest.mark.parametrize(
    ("changes", "limit"),
    [({}, "network"), ({"read": 9.0}, "reading"), ({"score": 3.0, "write": 4.0}, "writing")],
)
def test_slowest_of_the_three_stages_is_the_limit(changes, limit):
    seconds = {"read": 2.0, "network": 5.0, "stitch": 1.0, "score": 1.0, "write": 2.0} | changes
    rows = [
        {f"{part}_seconds": s for part, s in seconds.items()}
        | dict.fromkeys(SCENE_COLUMNS, 1.0) | {"seconds": 8.0, "device": "0", "day_night": "day"}
    ]  # fmt: skip
    found = results.inference_results(rows, 8.0)
    assert found["limited_by"] == limit
    assert found["shares"] == {part: s / 8 for part, s in seconds.items()}


@pytest.mark.parametrize(("seconds", "speed"), [((10.0, 2.0, 3.0), 24), ((10.0,), 6)])
def test_speed_of_training_ignores_the_first_of_several_epochs(seconds, speed):
    state = TrainingState([row_of_epoch(n, s) for n, s in enumerate(seconds, 1)])
    assert results.training_results(state, {"patches_train": 60})["patches_per_second"] == speed


def test_line_of_an_epoch_ends_with_the_time_of_the_remaining_ones():
    history = [row_of_epoch(1), row_of_epoch(2), row_of_epoch(3)]  # 12 s each
    assert results.epoch_line(history, 5).endswith("  24.0 s")
    assert results.epoch_line(history, 3).split()[-1] == "6.0"  # patches/s
    spent = sum(row["seconds"] for row in history)
    assert results.epoch_line(history, 5, spent + 7).endswith("  7.0 s")
    assert results.epoch_line(history, 5, spent + 700).endswith("  24.0 s")
    assert results.epoch_line(history, 5, spent - 1).split()[-1] == "6.0"


def test_summary_has_lines_of_80_columns_and_plurals_that_agree():
    inference = dict.fromkeys(MEAN_SCORES, 0.5) | {
        "scenes": 2, "scenes_labelled": 1, "synthetic": False, "seconds_per_scene": 1.0,
        "seconds_per_scene_parts": {"network": 0.5}, "shares": {"network": 0.5},
        "limited_by": "network",
    }  # fmt: skip
    lines = results.summary({
        "training": None, "inference": inference, "bad_scenes": [{}], "warnings": ["a b " * 40],
        "seconds": 5.0, "peak_rss": 1, "sampling": None, "devices": {"replicas": 2},
    })  # fmt: skip
    text = "\n".join(lines)
    assert max(map(len, lines)) <= 78 and "a b a b" in lines[-2]  # after an indent of two
    assert "mean of 1 scene\n" in text and "for 1 scene without a Bayesian" in text
    assert "1 bad scene, listed" in text and "1.00 s per scene, 2 scenes" in text
    assert "the network 0.50 s on each device\n" in text


@pytest.mark.parametrize(
    ("labels", "target", "is_shown"),
    [("bayes", None, True), ("none", None, False), ("/masks", None, False), ("none", 0.8, True)],
)
def test_target_of_bayesian_masks_is_not_shown_for_other_labels(labels, target, is_shown):
    training = {"target_accuracy": target or 0.9, "seconds_to_target": None}
    text = results.target_text(training, {"labels": labels, "target_accuracy": target})
    assert bool(text) == is_shown


def test_summary_gives_energy_in_kilowatt_hours():
    whole = {"training": None, "inference": None, "bad_scenes": [], "warnings": []}
    whole |= {"seconds": 5.0, "peak_rss": 1}
    (line,) = results.summary({**whole, "sampling": {"energy_joules": 7.2e6}})
    assert line.split(", ")[-1] == "2.000 kWh"
    (line,) = results.summary({**whole, "sampling": {"energy_joules": None}})
    assert "kWh" not in line


def test_progress_of_a_batch_job_gives_the_remaining_time(monkeypatch, caplog):
    now = iter(range(0, 1000, 100))  # each item takes 100 s
    monkeypatch.setattr("harness.console.time", SimpleNamespace(monotonic=lambda: next(now)))
    monkeypatch.setattr("sys.stderr.isatty", lambda: False, raising=False)
    caplog.set_level("INFO")
    assert list(progress("abc", "Masking", 3)) == ["a", "b", "c"]
    # The first item is given out after 100 s of this clock.
    assert caplog.messages == ["Masking: 1 of 3, 400 s left", "Masking: 2 of 3, 150 s left"]


def test_probability_and_uncertainty_need_four_bytes_each_per_pixel():
    pixels = 100 * 1200 * 1500
    masks, both = (results_bytes((1200, 1500, 9), 100, keep) for keep in (False, True))
    assert both - masks == pytest.approx(8 * pixels, rel=1e-6)
    assert masks - results_bytes((1200, 1500, 9), 0, False) == pytest.approx(pixels / 7, rel=1e-5)
