from pathlib import Path

import pytest
import yaml

from harness.config import FOLDER_KEYS, Config, dump_config, load_config
from harness.errors import UserError

# The values of mlcommons/science v1.1, with its own spelling.
V1 = """
benchmark: CloudMask
organisation: STFC
division: SciML
status: research
platform: nvidia gtx-2
accelerators_per_node: 16
submission:
      benchmark: CloudMask
      org: STFC
      division: SciML
      version: 1.0
      github_commit_version: 1.0
      status: research
      platform: nvidia gtx-2
train_dir: ~/sciml_bench/datasets/cloud_slstr_ds1/one-day
inference_dir: ~/sciml_bench/datasets/cloud_slstr_ds1/ssts
model_file : ~/sciml_bench/outputs/slstr_cloud/cloudModel.h5
output_dir : ~/sciml_bench/outputs/slstr_cloud
log_file: ./cloudMask_Log
mlperf_logfile: ./mlperf_stemdl.log
PATCH_SIZE: 256
IMAGE_H: 1200
IMAGE_W: 1500
N_CHANNELS: 9
MIN_SST: 273.15
CROP_SIZE: 80
seed: 1234
learning_rate: 0.001
epochs: 1
batch_size: 32
train_split: 0.8
clip_offset: 15
no_cache: False
nodes: 1
gpu: 1
"""


def load(tmp_path, text, *overrides):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return load_config(path, overrides)


def test_v1_1_file_works_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = load(tmp_path, V1)
    assert config.patch_size == 256 and config.submission.version == "1.0"
    assert config.train_dir == tmp_path / "sciml_bench/datasets/cloud_slstr_ds1/one-day"


def test_shipped_file_holds_every_key_at_its_default():
    with open("config.yaml", encoding="utf-8") as file:
        values = yaml.safe_load(file)
    defaults = Config()
    assert load_config("config.yaml") == defaults
    assert set(values) == {field.alias for field in Config.model_fields.values()}


AMBIGUOUS = ["010", "0042", "0o17", "0x10", "0b1", "12:30", "1_000", "1:1:1", "yes", "+", "1.2.3"]


@pytest.mark.parametrize("text", ["0/10", "9/10", "$TASK/10", "null"])
def test_shard_counts_from_zero(tmp_path, monkeypatch, text):
    monkeypatch.setenv("TASK", "7")
    expected = {"$TASK/10": "7/10", "null": None}.get(text, text)
    assert load(tmp_path, f"shard: {text}").shard == expected


@pytest.mark.parametrize("text", ["10/10", "0/0", "-1/10", "3", "1/2/3", "$NO_TASK/10", "a/b"])
def test_shard_that_does_not_exist_is_rejected(tmp_path, text):
    with pytest.raises(UserError, match="shard: "):
        load(tmp_path, f"shard: {text}")


@pytest.mark.parametrize("key", ["epochs", "learning_rate", "gpu", "seed", "IMAGE_H"])
@pytest.mark.parametrize("text", AMBIGUOUS)
def test_number_that_yaml_versions_read_differently_is_rejected_as_written(tmp_path, key, text):
    for file, override in ((f"{key}: {text}", "name=x"), ("", f"{key}={text}")):
        with pytest.raises(UserError, match=f"{key}: should be a number") as error:
            load(tmp_path, file, override)
        assert f"'{text}'" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("10", 10),
        ("+10", 10),
        ("'10'", 10),
        ("10.0", 10),
        ("1e1", 10),
        ("1.0e+1", 10),
        ("1.e1", 10),
    ],
)
def test_plain_number_is_read(tmp_path, text, value):
    config = load(tmp_path, f"epochs: {text}\nlearning_rate: {text}")
    assert (config.epochs, config.learning_rate) == (value, value)


@pytest.mark.parametrize(
    "text",
    [
        *AMBIGUOUS,
        "00012345",
        "5349",
        "1.10",
        "1e3",
        "no",
        "on",
        "True",
        "2026-01-02",
        "<<",
        "=",
    ],
)
def test_text_is_kept_as_written(tmp_path, text):
    config = load(tmp_path, f"run_name: {text}\nsubmission: {{version: {text}}}\nlog_file: {text}")
    assert (config.run_name, config.submission.version) == (text, text)
    assert config.log_file.name == text
    again = load(tmp_path, dump_config(config, "x"), f"run_name={text}")
    assert (again.run_name, again.log_file) == (text, config.log_file)
    assert again.submission == config.submission


@pytest.mark.parametrize(
    ("text", "value"),
    [("yes", True), ("on", True), ("True", True), ("no", False), ("FALSE", False)],
)
def test_switches_may_be_words(tmp_path, text, value):
    config = load(tmp_path, f"xla: {text}\ndeterministic: {text}")
    assert (config.xla, config.deterministic) == (value, value)


@pytest.mark.parametrize(
    "key", [name for name, field in Config.model_fields.items() if "int" in str(field.annotation)]
)
def test_integers_have_an_upper_bound(tmp_path, key):
    alias = Config.model_fields[key].alias
    value = f"[1, {10**30}]" if key == "profile_steps" else 10**30
    with pytest.raises(UserError, match=f"{alias}: .*less than"):
        load(tmp_path, f"{alias}: {value}")


# Files of the groups at UVA and NYU.
FLAT = """
sbatch: {mode: h, dir: localscratch}
experiment: {card_name: v100, gpu_count: 1, repeat: "1", epoch: "1,10,30,50,100"}
system: {host: rivanna, python: "3.10.8", num_cpus: 1}
training_loss: binary_crossentropy
training_metrics: accuracy
mask: "float"
"""
NESTED = """
name: cloudmask-rivanna
run: {filesystem: "/scratch/{os.USER}"}
submission: {org: University of Virginia, division: open, version: mlcommons-cloudmask-v2.0}
experiment: {card_name: v100, epoch: "5", seed: 1234, learning_rate: 0.01, no_cache: False}
training: {loss: binary_crossentropy, metrics: accuracy}
data:
  scratch: "/scratch/{os.USER}/data"
  training: "{data.scratch}/one-day"
  model: cloudModel.h5
log: {mlperf: c_mlperf.log}
image: {PATCH_SIZE: 128}
"""


def test_flat_file_of_another_group_runs_and_what_is_ignored_is_printed(tmp_path, caplog):
    caplog.set_level("INFO")
    config = load(tmp_path, V1 + FLAT)
    assert config == load(tmp_path, V1)
    (line,) = caplog.messages
    assert line.startswith("Ignored in ") and "\n" not in line
    for words in (
        "experiment (card_name, gpu_count, repeat, epoch)", "system (host, python, num_cpus)",
        "sbatch (", "training_loss", "training_metrics", "mask",
    ):  # fmt: skip
        assert words in line


def test_nested_file_of_another_group_is_answered_with_flat_keys(tmp_path, monkeypatch):
    monkeypatch.setenv("USER", "ada")
    with pytest.raises(UserError, match="has settings in blocks") as error:
        load(tmp_path, NESTED)
    text = str(error.value)
    head, lines = text.split("these lines: ")
    assert "\n" not in text and "experiment, run, training, data, image, log by" in head
    kept = [line for line in NESTED.splitlines() if line.startswith(("name:", "submission:"))]
    config = load(tmp_path, "\n".join([*kept, *lines.split("; ")]))
    assert config == Config(
        name="cloudmask-rivanna",
        submission={"version": "mlcommons-cloudmask-v2.0"},
        organisation="University of Virginia",
        epochs=5, learning_rate=0.01, no_cache=False, train_dir="/scratch/ada/data/one-day",
        model_file="cloudModel.h5", mlperf_logfile="c_mlperf.log", patch_size=128,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("experiment: {batch_size: 64}", "Replace experiment by these lines: batch_size: 64"),
        ("training_loss: mse", "training_loss can only be binary_crossentropy, found mse"),
        ("output: here", "unknown key 'output'"),
        ("mask: float", "unknown key 'mask'"),
    ],
)
def test_settings_that_would_be_lost_are_not_ignored(tmp_path, text, words):
    with pytest.raises(UserError) as error:
        load(tmp_path, text)
    assert words in str(error.value)


def test_all_faults_are_reported_at_once_with_key_and_value(tmp_path):
    with pytest.raises(UserError) as error:
        load(
            tmp_path, "epochs: 0\nprecision: float8\nbatchsize: 3\nlearning_rate: fast\nseed: true"
        )
    text = str(error.value)
    for words in (
        "epochs:", "found 0", "precision:", "'float8'", "unknown key 'batchsize'", "'batch_size'",
        "learning_rate:", "'fast'", "seed: should be a number",
    ):  # fmt: skip
        assert words in text
    assert "\n" not in text


# Nine lists, each of nine times the one before: 9**9 words from 300 bytes.
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "\n".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9)
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("CROP_SIZE: 256", "CROP_SIZE 256 must be smaller than PATCH_SIZE 256"),
        ("IMAGE_H: 200", "PATCH_SIZE 256 must fit in the image of IMAGE_H 200"),
        ("clip_offset: 128", "clip_offset 128"),
        ("CROP_SIZE: 31", "CROP_SIZE: "),
        ("PATCH_SIZE: 4", "PATCH_SIZE: "),
        ("learning_rate: .nan", "learning_rate: "),
        ("train_split: 1.0", "train_split: "),
        ("no_cache: true\ncache_dir: /tmp/x", "contradict"),
        ("no_cache: true\ncache: memory", "contradict"),
        ("cache: disk", "cache: disk needs cache_dir"),
        ("gpu: 1\ncpu_devices: 2", "set gpu: 0"),
        ("tensorboard: true\nprofile_steps: [3, 2]", "[3, 2] should be [first, last]"),
        ("profile_steps: [2, 3]", "needs tensorboard: true"),
        ("run_name: ../../elsewhere", "run_name: should be a plain folder name"),
        ("run_name: .hidden", "run_name: should be a plain folder name"),
        ("model_file: model", "model_file model must end in .keras or .h5"),
        ("log_file: ''", "log_file must be a file"),
        ("inference_mode: fast", "inference_mode: "),
        ("epochs: 0\nCROP_SIZE: 256", "CROP_SIZE 256 must be smaller"),
        ("train_dir: $NOT_SET_ANYWHERE/x", "NOT_SET_ANYWHERE"),
        (
            "train_dir: ~no_such_user/x",
            "train_dir: begins with ~, and the home directory is unknown",
        ),
        ("seed: 1\nseed: 2", "duplicate key seed"),
        ("- a\n- b", "found a list"),
        ("a: [", "is not valid YAML"),
        ("seed: &a 1", "the anchor or alias 'a' is not supported"),
        ("seed: *a", "the anchor or alias 'a' is not supported"),
        (BOMB, "the anchor or alias 'a0' is not supported"),
        ("a: " + "[" * 5000, "nested too deeply"),
        ("seed: 2019-13-45", "seed: should be a number"),
        ("seed: " + "1" * 5000, "seed: should be a number"),
        ("seed: 0x" + "f" * 5000, "seed: "),
        ("name: [" + "1, " * 5000 + "]", "'1',…"),
        ("\n".join(f"k{i}: 1" for i in range(300)), "and 270 more"),
        ("a: !!python/object/apply:os.system ['true']", "is not valid YAML"),
        ("log_file: results.json", "is the name of another file of every run"),
        ("mlperf_logfile: ./config.yaml", "is the name of another file of every run"),
        ("log_file: checkpoints/log", "is the name of another file of every run"),
        ("log_file: rank-0.log", "is the name of another file of every run"),
        ("log_file: a\nmlperf_logfile: ./a", "must be three different files"),
        ("log_file: /dev/full", "log_file /dev/full is not a regular file"),
        ("model_file: /dev", "model_file /dev is not a regular file"),
        ("log_file: ../a.log", "must be a file in the run's folder"),
        ("run_name: ' '", "1 to 200 characters"),
        (r'run_name: "a\nb"', "1 to 200 characters"),
        ("epochs: !!bool x", "is not valid YAML"),
    ],
)
def test_invalid_configuration_is_rejected_in_one_line(tmp_path, text, words):
    with pytest.raises(UserError) as error:
        load(tmp_path, text)
    assert words in str(error.value) and "\n" not in str(error.value)
    assert "config.yaml" in str(error.value)


@pytest.mark.parametrize("value", ["&a 1", "*a", "[&a [1], *a]"])
def test_set_accepts_no_aliases(tmp_path, value):
    with pytest.raises(UserError, match="--set seed: .* the anchor or alias 'a' is not supported"):
        load(tmp_path, "epochs: 3", f"seed={value}")


@pytest.mark.parametrize("value", ["[" * 5000, "!!int x", "{"])
def test_set_rejects_invalid_yaml(tmp_path, value):
    with pytest.raises(UserError, match="--set seed: "):
        load(tmp_path, "epochs: 3", f"seed={value}")


def test_file_over_64_kib_is_not_parsed(tmp_path):
    text = "# comment\n" + "#" * (1 << 16)
    with pytest.raises(UserError, match="config.yaml has more than 65536 bytes"):
        load(tmp_path, text)
    assert load(tmp_path, text[: 1 << 16]) == Config()
    with pytest.raises((UserError, OSError), match="/dev/zero is not a regular file"):
        load_config("/dev/zero")


def test_at_most_30_faults_are_reported(tmp_path):
    with pytest.raises(UserError) as error:
        load(tmp_path, "\n".join(f"k{i}: 1" for i in range(300)))
    assert str(error.value).count("unknown key") == 30


def test_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere.yaml"):
        load_config(tmp_path / "nowhere.yaml")


def test_set_overrides_the_file_in_yaml(tmp_path):
    config = load(tmp_path, "epochs: 3", "epochs=5", "learning_rate=1e-4", "gpu=0", "patience=null")
    assert (config.epochs, config.learning_rate, config.gpu) == (5, 1e-4, 0)
    with pytest.raises(UserError, match="KEY=VALUE"):
        load(tmp_path, "epochs: 3", "epochs")


@pytest.mark.parametrize(
    ("text", "override", "error"),
    [
        ("", "epochs=none", "--set: epochs: "),
        ("", "epoch=3", "--set: unknown key 'epoch' (similar: 'epochs')."),
        ("foo: 1", "seed=2", "config.yaml: unknown key 'foo' (config.yaml lists all keys)."),
        ("", "CROP_SIZE=300", "--set: CROP_SIZE 300 must be smaller than PATCH_SIZE 256."),
        ("CROP_SIZE: 300", "seed=2", "config.yaml: CROP_SIZE 300 must be smaller than PATCH_SIZE"),
        ("seed: x", "epochs=0", "config.yaml: seed: "),
        ("seed: x", "epochs=0", "; --set: epochs: "),
    ],
)
def test_error_names_the_file_or_the_option_of_the_key(tmp_path, text, override, error):
    with pytest.raises(UserError) as raised:
        load(tmp_path, text, override)
    assert error in str(raised.value)


def test_paths_expand_variables(tmp_path, monkeypatch):
    monkeypatch.setenv("SCENES", "/scenes")
    assert str(load(tmp_path, "train_dir: ${SCENES}/one-day").train_dir) == "/scenes/one-day"


@pytest.mark.parametrize(
    ("folders", "found"),
    [
        (("training", "inference"), ("training", "inference")),
        (("one-day", "ssts"), ("one-day", "ssts")),
        (("one-day", "training", "ssts", "inference"), ("one-day", "ssts")),
        (("training", "ssts"), ("training", "ssts")),
        ((), ("one-day", "ssts")),
    ],
)
@pytest.mark.parametrize("source", ["default", "shipped"])
def test_folders_of_the_data_have_either_name(tmp_path, monkeypatch, folders, found, source):
    shipped = Path("config.yaml").absolute()
    monkeypatch.chdir(tmp_path)
    for name in folders:
        Path("data", name).mkdir(parents=True)
    config = Config() if source == "default" else load_config(shipped)
    assert (config.train_dir, config.inference_dir) == tuple(Path("data", name) for name in found)


def test_only_missing_folders_of_the_data_have_another_name(tmp_path):
    for name in ("training", "inference", "one-day", "mine"):
        (tmp_path / name).mkdir()
    for given, used in (
        ("ssts", "inference"), ("inference", "inference"), ("one-day", "one-day"), ("x", "x"),
    ):  # fmt: skip
        config = load(tmp_path, f"train_dir: {tmp_path / given}")
        assert config.train_dir == tmp_path / used
    assert load(tmp_path, "train_dir: .").train_dir == Path(".")


def test_resolved_configuration_is_the_same_configuration(tmp_path):
    config = load(
        tmp_path, "train_dir: /a/b\ninference_dir: /c\noutput_dir: /d\nIMAGE_H: 800\nrun_name: x"
    )
    again = load(tmp_path, dump_config(config, "x"))
    assert again == config.model_copy(update={"run_name": None})


@pytest.mark.parametrize("key", FOLDER_KEYS)
def test_resolved_configuration_has_absolute_folders(tmp_path, monkeypatch, key):
    config = load(tmp_path, f"{key}: mine")
    monkeypatch.chdir(tmp_path)
    assert yaml.safe_load(dump_config(config, "x"))[key] == str(tmp_path / "mine")


def test_model_file_may_be_outside_the_run_folder(tmp_path):
    (tmp_path / "c.yaml").write_text("model_file: ../run/model.keras")
    assert load_config(tmp_path / "c.yaml").model_file.name == "model.keras"
