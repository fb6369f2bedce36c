"""tools/judge.py: masks with known errors, and estimates that must find these or warn."""

import itertools
import json

import h5py
import keras
import numpy as np
import pytest
from conftest import rows
from sklearn.metrics import accuracy_score, balanced_accuracy_score

from harness.config import Config
from tools import judge, validate_sst
from tools.lib import collocation
from tools.lib.collocation import RATES
from tools.lib.consistency import changed_shares
from tools.lib.matchups import STATISTICS, compare_masks
from tools.make_scenes import product_name, write_scene

CLOUD = 0.7
SENSITIVITIES = (0.95, 0.9, 0.8, 0.7, 0.6)
SPECIFICITIES = (0.7, 0.8, 0.95, 0.9, 0.65)


def independent_masks(rng, truth, n):
    """Masks with SENSITIVITIES and SPECIFICITIES, whose errors are independent."""
    return [
        np.where(truth, rng.random(truth.shape) < sens, rng.random(truth.shape) > spec)
        for sens, spec in zip(SENSITIVITIES[:n], SPECIFICITIES[:n], strict=True)
    ]


def balanced(i):
    return (SENSITIVITIES[i] + SPECIFICITIES[i]) / 2


# --- arithmetic -----------------------------------------------------------------------------


@pytest.mark.parametrize("n_masks", [3, 4, 5])
@pytest.mark.parametrize("cloud", [0.2, 0.5, 0.9])
def test_probabilities_of_independent_masks_give_their_accuracies(n_masks, cloud):
    # The model itself: each class's probability of a pattern is a product over masks.
    pairs = [*zip(SENSITIVITIES, SPECIFICITIES, strict=True)][:n_masks]
    shares = [
        cloud * np.prod([s if x else 1 - s for x, (s, _) in zip(pattern, pairs, strict=True)])
        + (1 - cloud)
        * np.prod([1 - q if x else q for x, (_, q) in zip(pattern, pairs, strict=True)])
        for pattern in (x[::-1] for x in itertools.product((0, 1), repeat=n_masks))
    ]
    for rates in collocation.combine(collocation.all_triplets(np.array(shares))):
        wanted = [(s, q, (s + q) / 2) for s, q in pairs]
        np.testing.assert_allclose(rates, wanted, atol=1e-9)


def test_agreement_and_true_rates_are_those_of_scikit_learn():
    rng = np.random.default_rng(1)
    truth, valid = rng.random((2, 60, 50)) < CLOUD
    masks = independent_masks(rng, truth, 3)
    counts = collocation.count_patterns([*masks, truth], valid)
    assert counts.sum() == valid.sum()
    accuracy, balanced_accuracy = collocation.agreement(counts)
    images = [image[valid] for image in (*masks, truth)]
    for i, j in itertools.product(range(4), repeat=2):
        assert accuracy[i, j] == pytest.approx(accuracy_score(images[j], images[i]))
        wanted = balanced_accuracy_score(images[j], images[i])
        assert balanced_accuracy[i, j] == pytest.approx(wanted)
    rates = collocation.true_rates(counts)
    assert rates[:, 2] == pytest.approx(balanced_accuracy[:3, 3])
    assert rates[:, 0] == pytest.approx([image[images[3]].mean() for image in images[:3]])
    errors = [np.corrcoef([image[images[3] == y] for image in images[:3]]) for y in (0, 1)]
    np.testing.assert_allclose(collocation.error_correlations(counts), np.mean(errors, axis=0))


def test_limits_contain_the_truth_and_shrink_with_more_scenes():
    rng, widths = np.random.default_rng(2), []
    for n_scenes in (10, 160):
        cloud = rng.random((n_scenes, 40)) < rng.uniform(0.4, 0.95, (n_scenes, 1))
        counts = [
            collocation.count_patterns(independent_masks(rng, c, 4), np.ones_like(c)) for c in cloud
        ]
        values, best = collocation.estimate(np.array(counts))
        low, high = values["_low"][:, 2], values["_high"][:, 2]
        widths.append((high - low).mean())
        assert best.sum() == pytest.approx(1)
    assert widths[1] < widths[0] / 2
    assert all(low[i] < balanced(i) < high[i] for i in range(4))


DEPENDENT = {  # what is done to four independent masks, and how the report begins
    "nothing": (lambda rng, truth, a, b, c, d: (a, b, c, d), None),
    "half of b copies a": (
        lambda rng, truth, a, b, c, d: (a, np.where(rng.random(a.shape) < 0.5, a, b), c, d),
        "The triplets disagree on the balanced accuracy of a, b",
    ),
    "half of d copies b": (
        lambda rng, truth, a, b, c, d: (a, b, c, np.where(rng.random(a.shape) < 0.5, b, d)),
        "The triplets disagree on which is better: b or c, c or d.",
    ),
    "d is right where c is wrong": (
        lambda rng, truth, a, b, c, d: (a, b, c, np.where(c == truth, d, truth)),
        "The triplets disagree on the balanced accuracy of a, b, c, d.",
    ),
    "a is inverted": (
        lambda rng, truth, a, b, c, d: (~a, b, c, d),
        "3 of 4 triplets have no solution, for example that of a, b, c:",
    ),
}


@pytest.mark.parametrize("what", DEPENDENT)
def test_dependent_errors_are_reported(what):
    spoil, sign = DEPENDENT[what]
    rng = np.random.default_rng(3)
    truth = rng.random((400, 500)) < CLOUD
    masks = spoil(rng, truth, *independent_masks(rng, truth, 4))
    counts = collocation.count_patterns(masks, np.ones_like(truth))
    texts = collocation.signs_of_dependence("abcd", collocation.all_triplets(counts))
    assert any(text.startswith(sign) for text in texts) if sign else not texts


def test_masks_without_solution_are_never_the_best():
    truth = np.random.default_rng(7).random((50, 40)) < CLOUD
    masks = [*independent_masks(np.random.default_rng(8), truth, 2), np.ones_like(truth)]
    counts = collocation.count_patterns(masks, np.ones_like(truth))
    values, best = collocation.estimate(np.array([counts, counts]))
    assert np.isnan([*values.values()]).all() and not best.any()


def test_equal_coverage_takes_the_clearest_match_ups():
    difference = np.array([0.0, 0.1, -0.1, -3.0, -5.0])
    scores = np.array([[0.1, 0.2, 0.3, 0.4, 0.9], [np.nan] * 5, [0.9, 0.8, 0.7, 0.1, 0.2]]).T
    cloud = np.array([[0, 0, 0, 0, 1], [0, 0, 1, 1, 1], [1, 1, 1, 0, 0]], bool).T
    found = {
        (r["mask"], r["as_clear_as"]): r for r in compare_masks("xyz", cloud, scores, difference)
    }
    wanted = {  # median, median distance from it, share below -2
        ("x", ""): (4, -0.05, 0.1, 0.25),  # 0 .1 -.1 -3; distances .05 .15 .05 2.95
        ("y", ""): (2, 0.05, 0.05, 0),
        ("z", ""): (2, -4.0, 1.0, 1),
        ("x", "y"): (2, 0.05, 0.05, 0),
        ("z", "y"): (2, -4.0, 1.0, 1),
    }
    assert found.keys() == wanted.keys()
    for key, (n, median, distance, cold) in wanted.items():
        assert found[key]["cold_share"] == cold
        assert (found[key]["matchups"], found[key]["coverage"]) == (n, n / 5)
        assert found[key]["median"] == pytest.approx(median)
        assert found[key]["robust_std"] == pytest.approx(1.4826 * distance)
    # With scores for all, the mask with the fewest is the reference.
    scores[:, 1] = [0.1, 0.2, 0.6, 0.7, 0.8]
    references = {r["as_clear_as"] for r in compare_masks("xyz", cloud, scores, difference)}
    assert references == {"", "y"}


# --- consistency ----------------------------------------------------------------------------


def right_neighbour():
    """A network that says cloud where S9 of the pixel to the right is warmer than 270 K."""
    inputs = keras.Input((None, None, 9))
    layer = keras.layers.Conv2D(1, 3, padding="same", activation="sigmoid")
    model = keras.Model(inputs, layer(inputs))
    kernel = np.zeros((3, 3, 9, 1), np.float32)
    kernel[1, 2, 8] = 1
    layer.set_weights([kernel, np.zeros(1)])
    return model


def test_only_changes_that_the_network_sees_count(tmp_path):
    rng = np.random.default_rng(4)
    bts = rng.uniform(250, 290, (40, 50, 3)).astype(np.float32)
    bts[3:6, 10:20, 1] = 0  # no data
    scene = tmp_path / product_name("ssts", 0)
    write_scene(scene, {"bts": bts, "refs": np.zeros((40, 50, 6)), "bayes": np.zeros((40, 50, 1))})
    right_neighbour().save(tmp_path / "model.keras")
    config = Config(patch_size=32, crop_size=8)
    shares = changed_shares(tmp_path / "model.keras", config, [scene])
    warm = np.pad(bts[..., 2] > 270, 1)
    valid = (bts != 0).all(-1)
    wanted = (warm[1:-1, 2:] != warm[1:-1, :-2])[valid].mean()
    assert shares == {"shift": 0, "flip_rows": 0, "flip_cols": pytest.approx(wanted)}


# --- the command ----------------------------------------------------------------------------

SHAPE = (60, 80)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Scenes whose label and threshold are two masks; a run and two folders with three others."""
    folder, rng = tmp_path_factory.mktemp("world"), np.random.default_rng(5)
    (folder / "run").mkdir()
    (folder / "run/config.yaml").write_text(f"inference_dir: {folder}/ssts\nMIN_SST: 280\n")
    row, col = np.mgrid[: SHAPE[0], : SHAPE[1]]
    for i in range(12):
        truth = rng.random(SHAPE) < rng.uniform(0.5, 0.9)
        label, threshold, run, other, third = independent_masks(rng, truth, 5)
        bts = np.full((*SHAPE, 3), 285, np.float32)
        bts[threshold, 2] = 275
        bts[:, :2] = 0
        name = product_name("ssts", i).removesuffix(".hdf")
        write_scene(
            folder / "ssts" / ("day", "night")[i % 2] / f"{name}.hdf",
            {
                "bts": bts, "bayes": 255.0 * label[..., None],
                "truth": truth[..., None].astype(np.uint8),
                "latitude": 50 - 0.009 * row, "longitude": 10 + 0.014 * col,
            },
        )  # fmt: skip
        for where, mask in (("run/masks", run), ("other", other), ("third", third)):
            (folder / where).mkdir(exist_ok=True)
            with h5py.File(folder / where / f"{name}.h5", "w") as file:
                file["mask"] = mask.astype(np.uint8)
                file["probability"] = np.where(mask, 0.8, 0.2) + rng.uniform(-0.1, 0.1, SHAPE)
    (folder / "third" / f"{name}.h5").unlink()
    return folder


def test_command_finds_the_accuracies_and_the_truth(world, tmp_path, capsys):
    masks = ["bayes", "threshold", world / "run", world / "other"]
    assert judge.main([*map(str, masks), "-o", str(tmp_path / "out")]) == 0
    table = rows(tmp_path / "out/masks.csv")
    assert [row["day_night"] for row in table] == ["day"] * 4 + ["night"] * 4 + ["all"] * 4
    for i, row in enumerate(table[8:]):
        assert row["mask"] == ["bayes", "threshold", "run", "other"][i]
        assert (int(row["scenes"]), int(row["pixels"])) == (12, 12 * 60 * 78)  # 2 columns missing
        for rate, value in zip(
            RATES, (SENSITIVITIES[i], SPECIFICITIES[i], balanced(i)), strict=True
        ):
            assert float(row[f"true_{rate}"]) == pytest.approx(value, abs=0.01)
            assert float(row[rate]) == pytest.approx(value, abs=0.03)
            assert float(row[f"{rate}_low"]) < float(row[rate]) < float(row[f"{rate}_high"])
    results = json.loads((tmp_path / "out/judge.json").read_text())
    assert np.shape(results["agreement"]) == (5, 5)  # and the truth
    (warning,) = results["warnings"]  # nothing else is wrong
    assert warning.startswith("Do not trust the order of bayes, run: the errors of networks")
    screen = capsys.readouterr().out
    for title in ("Accuracy if the column", "Accuracy, estimated", "Correlation of the errors"):
        assert title in screen and f"## {title}" in (tmp_path / "out/judge.md").read_text()


def test_only_scenes_of_all_masks_count(world, tmp_path, capsys):
    options = [str(world / "third"), "bayes", "--data", str(world / "ssts"), "-o", str(tmp_path)]
    assert judge.main(options) == 0
    assert [row["scenes"] for row in rows(tmp_path / "masks.csv")[::2]] == ["6", "5", "11"]
    assert "11 of 12 scenes have all masks" in capsys.readouterr().err


def test_sst_agrees_with_the_validation_of_one_run(world, tmp_path, capsys):
    rng, lines = np.random.default_rng(6), []
    for i in range(12):
        name = product_name("ssts", i).removesuffix(".hdf")
        time = (
            f"{name[16:20]}-{name[20:22]}-{name[22:24]}T{name[25:27]}:{name[27:29]}:{name[29:31]}Z"
        )
        for row, col in zip(rng.integers(0, 60, 50), rng.integers(0, 80, 50), strict=True):
            at = f"{50 - 0.009 * row},{10 + 0.014 * col}"
            lines.append(f"{time},{at},290,{290 + rng.normal():.3f},5,30")
    table = tmp_path / "table.csv"
    table.write_text("\n".join([",".join(validate_sst.COLUMNS), *lines]))
    run = str(world / "run")
    assert validate_sst.main([run, str(table), "-o", str(tmp_path / "sst")]) == 0
    out = tmp_path / "out"
    assert judge.main([run, "bayes", "--matchups", str(table), "-o", str(out)]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80
    wanted = [row for row in rows(tmp_path / "sst/statistics.csv") if row["day_night"] == "all"]
    found = rows(out / "sst.csv")
    for row, names in zip(found[:2], (("run", "cloudmask"), ("bayes", "bayes")), strict=True):
        statistics = next(w for w in wanted if w["mask"] == names[1])
        assert (row["mask"], row["as_clear_as"]) == (names[0], "")
        for column in ("matchups", *STATISTICS):
            assert row[column] == statistics[column]
    assert found[2]["as_clear_as"] == "bayes" and found[2]["matchups"] == found[1]["matchups"]


def test_three_masks_have_no_best_and_impossible_limits_are_named(tmp_path, capsys):
    rng, truth = np.random.default_rng(9), np.random.default_rng(10).random(SHAPE) < CLOUD
    for i in range(2):
        a, b, c = independent_masks(rng, truth, 3)
        if i:  # in one of two scenes a is right where b is wrong: c seems better than possible
            a, c = np.where(b == truth, a, truth), truth
        name = product_name("ssts", i).removesuffix(".hdf")
        for folder, mask in (("a", a), ("b", b), ("c", c)):
            (tmp_path / folder).mkdir(exist_ok=True)
            with h5py.File(tmp_path / folder / f"{name}.h5", "w") as file:
                file["mask"] = mask.astype(np.uint8)
        write_scene(tmp_path / f"ssts/day/{name}.hdf", {"bts": np.full((*SHAPE, 3), 280.0)})
    folders = [str(tmp_path / name) for name in "abc"]
    assert judge.main([*folders, "--data", str(tmp_path / "ssts"), "-o", str(tmp_path)]) == 0
    found = rows(tmp_path / "masks.csv")
    assert not any("best" in row for row in found)
    screen = capsys.readouterr()
    assert " best " not in screen.out
    assert "do not trust the order of the estimates" in screen.err
    assert float(found[2]["balanced_accuracy_high"]) > 1
    assert "below 0, above 1 or nan are impossible: c. The errors" in screen.err


@pytest.mark.parametrize(
    ("masks", "reason"),
    [
        (["bayes"], "Give 2 to 10 masks, found 1"),
        (["bayes", "bayes"], "bayes is given twice"),
        (["bayes", "ssts"], "No masks in ssts: it should be the folder of a run"),
        (["bayes", "threshold"], "No mask is that of a run. Give the folder of the scenes"),
        (["run", "run/masks"], "run and masks are the same mask. Leave one of them out"),
        (["run", "summary"], "has no dataset 'summary'. Name masks that all scenes have"),
        (["run", "bayes", "--scene", "x"], "Not all masks have the scene 'x'"),
        (["run", "bayes", "--consistency", "2"], "--consistency needs a run with its model file"),
    ],
)
def test_mistakes_are_one_line(world, monkeypatch, capsys, masks, reason):
    monkeypatch.chdir(world)
    assert judge.main(masks) == 2
    (line,) = (x for x in capsys.readouterr().err.splitlines() if x.startswith("Error: "))
    assert reason in line


def test_options_of_match_ups_without_their_table_are_usage_errors(capsys):
    values = {"geodetic": "x", "minutes": "1", "min-sst": "271", "celsius": "buoy_sst"}
    for option in ([f"--{name}", value] for name, value in values.items()):
        with pytest.raises(SystemExit, match="2"):
            judge.main(["run", "bayes", *option])
        assert "need --matchups TABLE" in capsys.readouterr().err
