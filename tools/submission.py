r"""Turn runs into a submission to MLCommons Science: check them, then write the folder.

    python tools/submission.py RUN_DIR ... --system NAME -o DIR
    python tools/submission.py outputs/run-* --system rivanna-a100 --descriptor experiment-2 \
        --system-json rivanna.json --script my_job.sh -o submission

Writes DIR/{organisation}/cloudmask/{system}/{descriptor}/ with

    result-1.txt ...             the MLPerf log of each run
    config.yaml                  the configuration of them all, with the code's commit
    run.sh                       repeats the runs; besides it what --script names
    {system}.json                the system, in the fields of MLPerf
    README.md                    table: measurement, reference value, submitted value; how to run
    scientific_contribution.md   a template, to be filled in and submitted as PDF

Nothing is written unless all runs pass: each ended in success with training and inference, its log
is the one that it left (SHA-256 in results.json), passes mlperf_logging's compliance checker with
harness/mlperf_rules.yaml and agrees with results.json, history.csv and scenes.csv; all runs have
the same configuration, devices, versions and scenes and one commit, without changes. Faults are
told together, a line each, and the exit status is 2.

The rules are MLCommons Science's, https://github.com/mlcommons/science: submit.adoc for folder and
files (it spells the PDF sientific_contribution.pdf), policy.adoc for the rest. CloudMask wants ten
runs. By its table of hyperparameters PATCH_SIZE is 256, the seed 1234 and MIN_SST no lower than
273.15: demanded in the closed division, with what else makes the reference; the open division may
change all. One config.yaml defines all runs, so that the seed is the same in all, unlike in MLPerf
Training. The system's description has the fields that mlperf_logging's system_desc_checker demands
(MLPerf HPC), since the policy names none.

What is known of the system is what the first run noted of its first node; nothing is taken from the
machine that this program runs on. --system-json gives the rest: {"field": "text", ...}.
"""

import argparse
import json
import logging
import math
import os
import re
import shutil
import statistics
import sys
import uuid
from collections import defaultdict
from pathlib import Path

import yaml

from _command import exit_status
from harness.config import FILE_KEYS, Config, check, load_config, resolved
from harness.console import format_bytes, log_to_screen, printable
from harness.errors import UserError
from harness.files import file_sha256, write_json, write_text
from harness.records.saved_runs import differences, measures, read_run
from tools.compare import markdown, markdown_table
from tools.lib.log_check import log_file, objections

RUNS_WANTED = 10  # of CloudMask, policy.adoc, 'Benchmark Results'
TARGET = 0.9  # accuracy, policy.adoc, 'Benchmarks'
SCENES = {"train_dir": 970, "inference_dir": 100}  # of the benchmark's data, one-day and ssts
CONFIG_HEADER = r"""# Of all runs of this submission; run.sh repeats them. The code is that of
# submission.github_commit_version. The benchmark's data, to train and to mask, come by
#   for set in one-day ssts; do
#       aws s3 --no-sign-request --endpoint-url https://s3.echo.stfc.ac.uk \
#           sync s3://sciml-datasets/es/cloud_slstr_ds1/$set data/$set
#   done
"""

# What makes the reference workload, besides what policy.adoc leaves free in the closed division:
# epochs, learning_rate, batch_size and MIN_SST.
FIXED_IN_CLOSED = (
    "image_h", "image_w", "n_channels", "patch_size", "crop_size", "seed", "train_split",
    "clip_offset", "cloud_weight", "inference_mode",
)  # fmt: skip
OF_THE_PLACE = {"train_dir", "inference_dir", "output_dir", "cache_dir"}  # absolute in config.yaml

UNKNOWN, NONE = "unknown: fill in", "none"
# What mlperf_logging's system_desc_checker demands, in its order.
SYSTEM_FIELDS = (
    "submitter", "division", "status", "system_name", "number_of_nodes",
    "host_processors_per_node", "host_processor_model_name", "host_processor_core_count",
    "host_processor_vcpu_count", "host_processor_frequency", "host_processor_caches",
    "host_processor_interconnect", "host_memory_capacity", "host_storage_type",
    "host_storage_capacity", "host_networking", "host_networking_topology",
    "host_memory_configuration", "accelerators_per_node", "accelerator_model_name",
    "accelerator_host_interconnect", "accelerator_frequency", "accelerator_on-chip_memories",
    "accelerator_memory_configuration", "accelerator_memory_capacity", "accelerator_interconnect",
    "accelerator_interconnect_topology", "cooling", "hw_notes", "framework",
    "other_software_stack", "operating_system", "sw_notes",
)  # fmt: skip
TOLD_BY_RUNS = ("submitter", "division", "status", "system_name")

# Rows of the table in README.md: name, measure of tools/runs.py, decimals, what it is.
MEASUREMENTS = (
    (
        "accuracy",
        4,
        "share of pixels of `ssts` that agree with the Bayesian mask, mean over scenes",
    ),
    ("valid_accuracy", 4, "the same without pixels that lack data"),
    ("val_accuracy", 4, "share of pixels of the validation patches, best epoch"),
    ("val_loss", 4, "binary cross-entropy there"),
    ("time_to_train", 1, "from run_start to the last eval_stop [s]"),
    ("seconds_per_epoch", 2, "training and validation [s]"),
    ("patches_per_second", 1, "training, without the first epoch"),
    ("seconds_per_scene", 3, "masking [s]"),
    ("peak_rss", 0, "most memory of the first rank's process [bytes]"),
    ("peak_gpu_memory", 0, "most memory that TensorFlow took on a GPU of the first rank [bytes]"),
    ("energy_joules", 0, "energy of a run [J]"),
    ("all_cloud_accuracy", 4, "baseline: all pixels cloud"),
    ("threshold_accuracy", 4, "baseline: cloud where 12 µm is colder than MIN_SST"),
)

log = logging.getLogger("submission")


# --- checking -------------------------------------------------------------------------------


def faults_of(runs):
    """All that keeps runs from being submitted, as texts that name the run."""
    found = []
    for run in runs:
        name = f"{run.folder}: "
        if run.status != "success":
            found.append(f"{name}it ended as '{run.status}', wanted is a run that ended in success")
            continue
        if run.results.get("mode") != "benchmark":
            found.append(f"{name}it is of --mode {run.results.get('mode')}, wanted is benchmark")
            continue
        try:
            texts = [*code_faults(run), *config_faults(run), *objections(run)]
        except (KeyError, TypeError, AttributeError) as error:
            texts = [f"results.json is not that of a whole run ({type(error).__name__}: {error})"]
        found += [name + text for text in texts]
    by_log = defaultdict(list)
    for run in runs:
        by_log[str(run.results.get("mlperf_sha256", run.folder))].append(str(run.folder))
    found += [
        f"{' and '.join(folders)} are one run. Name each once"
        for folders in by_log.values()
        if len(folders) > 1
    ]
    for place, values in differences([r for r in runs if r.status == "success"]).items():
        shown = ", ".join(json.dumps(value) for value in dict.fromkeys(map(_hashable, values)))
        found.append(f"The runs should be of one kind, {place} differs: {shown}")
    return [printable(text) for text in dict.fromkeys(found)]


def _hashable(value):
    return value if isinstance(value, str | int | float | None) else json.dumps(value)


def code_faults(run):
    """Whether the code of a run is known, and one in all its parts."""
    commit = run.results.get("git_commit")
    if commit is None:
        return ["its commit is not known. Run it in a git checkout of the benchmark"]
    if not re.fullmatch("[0-9a-f]{40}", str(commit)):
        return [f"its code was changed, commit {commit}. Commit the changes and run it again"]
    return [
        f"a part of it was made with other {name} than the last. Run it anew"
        for name in ("git_commit", "versions", "devices")
        if any(part.get(name) != run.results[name] for part in run.results["parts"])
    ]


def config_faults(run):
    """Whether the configuration is that of results.json, and fit for its division."""
    try:
        config = load_config(run.folder / "config.yaml")
        of_results = check(run.results["config"], run.folder / "results.json")
    except UserError as error:
        return [str(error)]
    found, values = [], resolved(of_results)
    for key in ("train_dir", "inference_dir"):  # results.json has them as they were given
        given = os.path.normpath(run.results["config"][key])
        if not given.startswith("..") and not f"/{getattr(config, key)}".endswith(f"/{given}"):
            found.append(f"config.yaml has {key} {getattr(config, key)}, results.json {given}")
    for key, value in resolved(config).items():
        if key not in OF_THE_PLACE and value != values[key]:
            found.append(f"config.yaml has {key} {value}, results.json {values[key]}")
    if not folder_name(config.organisation) or config.organisation == "unknown":
        found.append(f"organisation is '{config.organisation}'. Set it and run again")
    if config.benchmark.lower() != "cloudmask":
        found.append(f"benchmark is '{config.benchmark}', wanted is cloudmask")
    if config.division not in ("open", "closed"):
        found.append(f"division is '{config.division}', wanted is open or closed")
    if config.division == "closed":
        found += closed_faults(run, config)
    return found


def closed_faults(run, config):
    """What the closed division does not allow."""
    found, reference = [], Config()
    for key in FIXED_IN_CLOSED:
        value, wanted = getattr(config, key), getattr(reference, key)
        if value != wanted:
            name = Config.model_fields[key].alias
            found.append(f"the closed division wants {name} {wanted}, found {value}")
    if config.min_sst < reference.min_sst:
        found.append(f"the closed division wants MIN_SST of 273.15 or more, found {config.min_sst}")
    return found + [f"the closed division wants {text}" for text in other_data(run)]


def other_data(run):
    """Say where the scenes are not as many as the benchmark's."""
    training, inference = run.results["training"], run.results["inference"]
    n = {
        "train_dir": training.get("scenes_train", 0) + training.get("scenes_test", 0),
        "inference_dir": inference.get("scenes", 0),
    }
    return [f"{SCENES[key]} scenes in {key}, found {n[key]}" for key in n if n[key] != SCENES[key]]


def remarks_on(runs):
    """What MLCommons Science wants besides, and a reviewer will ask about."""
    first, config = runs[0], runs[0].results["config"]
    found = [f"MLCommons Science wants {text}" for text in other_data(first)]
    if len(runs) < RUNS_WANTED:
        found.append(f"MLCommons Science wants {RUNS_WANTED} runs of CloudMask, found {len(runs)}")
    found += [
        f"MLCommons Science wants {what}, the runs have none: set {key} before you make them"
        for what, key in (
            ("the name of a person", "name"),
            ("an e-mail address", "email"),
            ("the version of the code", "submission: {version: ...}"),
        )
        if not (config[key] if key in config else config["submission"]["version"])
    ]
    if config["platform"] == "unknown":
        found.append("The logs give the platform as 'unknown'")
    if bad := sum(len(run.results.get("bad_scenes") or []) for run in runs):
        found.append(
            f"Scenes were left out because they could not be read, {bad} times in all runs"
        )
    found.append("The logs say cache_clear false: the policy wants the node's file cache emptied")
    return found


# --- what is written ------------------------------------------------------------------------


def describe_system(run, system, given):
    """Describe the system in SYSTEM_FIELDS.

    Args:
        run: Run that ended in success.
        system: Its name.
        given: Fields that the user gives; they win over what the run noted.
    """
    results = run.results
    config, devices, machine = results["config"], results["devices"], results.get("machine") or {}
    gpus, n_gpus = machine.get("gpus") or [], devices["accelerators_per_node"]
    sockets = machine.get("sockets")
    cores, threads, memory = (machine.get(key) for key in ("cores", "threads", "memory"))
    versions = dict(results["versions"])
    framework = f"TensorFlow {versions.pop('tensorflow', '?')}, Keras {versions.pop('keras', '?')}"
    drivers = ", ".join(sorted({gpu["driver"] for gpu in gpus}))
    known = {
        "submitter": config["organisation"],
        "division": config["division"],
        "status": config["status"],
        "system_name": system,
        "number_of_nodes": devices["nodes"],
        "host_processors_per_node": sockets,
        "host_processor_model_name": machine.get("processor"),
        "host_processor_core_count": cores and sockets and cores // sockets,
        "host_processor_vcpu_count": threads and sockets and threads // sockets,
        "host_memory_capacity": memory and format_bytes(memory),
        "accelerators_per_node": n_gpus,
        "framework": framework,
        "other_software_stack": versions | ({"NVIDIA driver": drivers} if drivers else {}),
        "operating_system": ", ".join(
            text for key in ("operating_system", "kernel") if (text := machine.get(key))
        ),
        "hw_notes": f"as the run saw it: {devices['description']}",
        "sw_notes": f"CloudMask, commit {results['git_commit']}",
    }
    if n_gpus == 0:
        known |= {key: NONE for key in SYSTEM_FIELDS if key.startswith("accelerator_")}
    elif gpus:
        known["accelerator_model_name"] = ", ".join(sorted({gpu["name"] for gpu in gpus}))
        memories = sorted({format_bytes(gpu["memory"]) for gpu in gpus})
        known["accelerator_memory_capacity"] = ", ".join(memories)
    if devices["nodes"] == 1:
        known |= {"host_networking": NONE, "host_networking_topology": NONE}
    known |= given
    return {key: _field(known.get(key)) for key in SYSTEM_FIELDS}


def _field(value):
    """A field as MLPerf's programs read it: text, or a dictionary of texts."""
    if isinstance(value, dict):
        return {key: str(item) for key, item in value.items()}
    return UNKNOWN if value in (None, "") else str(value)


def read_system_json(path):
    """Read what the user says of the system.

    Raises:
        UserError: If it is no JSON of fields that are known.
    """
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSON: {error}.") from None
    if not isinstance(given, dict):
        raise UserError(f'{path} should hold {{"field": "text", ...}}.')
    if told := [key for key in given if key in TOLD_BY_RUNS]:
        raise UserError(f"{path} has the field {told[0]}, which the runs or --system tell.")
    if unknown := [key for key in given if key not in SYSTEM_FIELDS]:
        raise UserError(
            f"{path} has the unknown field {unknown[0]}; known are {', '.join(SYSTEM_FIELDS)}."
        )
    return given


def folder_name(text):
    """A name for folders and git: anything but letters, digits and . + - becomes _."""
    return re.sub(r"[^\w.+-]+", "_", text, flags=re.ASCII).strip("._")


def config_text(run):
    """config.yaml of the submission: the runs' own, with the commit."""
    values = resolved(load_config(run.folder / "config.yaml"))
    values["output_dir"] = "outputs"
    for key in FILE_KEYS:
        if os.path.isabs(values[key]):  # where one run would replace the file of another
            values[key] = os.path.basename(values[key])
    values["submission"]["github_commit_version"] = run.results["git_commit"]
    return CONFIG_HEADER + yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def script_text(run, n_runs):
    """run.sh: repeats the runs."""
    return f"""#!/usr/bin/env bash
# Repeats the {n_runs} run(s) of this submission:
#   CLOUDMASK=checkout bash run.sh [--set train_dir=... inference_dir=...]
# where checkout is the benchmark at the commit below. Results come into outputs/ of this folder.
# On several nodes give the command of the scheduler: START='srun' CLOUDMASK=checkout bash run.sh
set -euo pipefail
commit={run.results["git_commit"]}
here=$(cd "$(dirname "${{BASH_SOURCE[0]}}")" && pwd)
cd "${{CLOUDMASK:?set it to a checkout of the benchmark}}"
found=$(git describe --always --abbrev=40 --dirty '--exclude=*')
if [ "$found" != "$commit" ]; then
    echo "Error: $CLOUDMASK should be at commit $commit without changes, found $found." >&2
    exit 2
fi
for n in $(seq {n_runs}); do
    ${{START:-}} python slstr_cloud.py --config "$here/config.yaml" \\
        --set run_name="result-$n" output_dir="$here/outputs" "$@"
done
"""


def time_to_train(run):
    """Seconds from run_start to the end of the last validation, by the MLPerf log."""
    lines = log_file(run).read_text(encoding="utf-8").splitlines()
    events = [json.loads(line.partition(" ")[2]) for line in lines]
    times = {event["key"]: event["time_ms"] for event in events}  # the last of each key
    return (times["eval_stop"] - times["run_start"]) / 1000


def measurement_table(runs, references):
    """The table of README.md, and the average difference from the reference.

    Args:
        runs: Runs.
        references: {measurement: reference value}.
    """
    measured = [measures(run) | {"time_to_train": time_to_train(run)} for run in runs]
    rows, differing = [], []
    for name, decimals, what in MEASUREMENTS:
        values = [values[name] for values in measured]
        if None in values:
            continue
        mean, reference = statistics.mean(values), references.get(name)
        spread = f" ± {statistics.stdev(values):.{decimals}f}" if len(values) > 1 else ""
        shown = "none" if reference is None else f"{reference:g}"
        rows.append(f"| {name} | {shown} | {mean:.{decimals}f}{spread} | {what} |")
        if reference is not None and name.endswith("accuracy"):  # one unit
            differing.append(mean - reference)
    head = "| measurement | reference value | submitted value | what it is |\n|---|---|---|---|"
    average = statistics.mean(differing)
    return "\n".join([head, *rows]), (
        f"Average difference between submitted and reference values of {len(differing)} "
        f"accuracy value(s): {average:+.4f}"
    )


def readme_text(runs, system, references, remarks, scripts):
    """README.md of the submission.

    Args:
        runs: Runs.
        system: Description of the system.
        references: {measurement: reference value}.
        remarks: Of `remarks_on`.
        scripts: Names of the scripts of --script.
    """
    first = runs[0]
    config, training = first.results["config"], first.results["training"]
    table, average = measurement_table(runs, references)
    rows = [
        [
            f"result-{number}.txt",
            run.results["start"],
            f"{run.results['inference']['accuracy']:.4f}",
            str(run.results["training"]["epochs_run"]),
            f"{time_to_train(run):.1f}",
            file_sha256(log_file(run)),
        ]
        for number, run in enumerate(runs, 1)
    ]
    run_table = markdown_table(
        ["run", "start", "accuracy", "epochs", "time to train [s]", "SHA-256 of the log"], rows
    )
    n_reached = sum(run.results["inference"]["accuracy"] >= TARGET for run in runs)
    unknown = [name for name, value in system.items() if value == UNKNOWN]
    notes = [*remarks, *(f"{name} of the system is unknown" for name in unknown)]
    listed = "".join(f"- {markdown(text)}\n" for text in notes)
    listed_scripts = "".join(f"| {markdown(name)} | script of the system |\n" for name in scripts)
    return f"""# CloudMask on {markdown(system["system_name"])}, {markdown(config["organisation"])}

{table}

Means over {len(runs)} run(s) and, of several, the standard deviation. The convergence target of
MLCommons Science is an accuracy of {TARGET}; {n_reached} of {len(runs)} run(s) reached it.
{average}.

{run_table}

- Division: {markdown(config["division"])}. Status: {markdown(config["status"])}.
- System: {markdown(first.results["devices"]["description"])}; `{system["system_name"]}.json`
- Code: CloudMask, commit {first.results["git_commit"]}
- Scenes: {training["scenes_train"]} to train, {training["scenes_test"]} to validate,
  {first.results["inference"]["scenes"]} to mask
- Contact: {markdown(config["name"] or "none given")}, {markdown(config["email"] or "none given")}

## To run it

Check out the commit above, install its requirements as its README.md says, get the data by the
commands in `config.yaml`, and

```bash
CLOUDMASK=path/to/checkout bash run.sh --set train_dir=data/one-day inference_dir=data/ssts
```

| file | holds |
|---|---|
| `result-n.txt` | the MLPerf log of run n |
| `config.yaml` | all parameters of all runs |
| `{system["system_name"]}.json` | the system |
| `run.sh` | repeats the runs |
{listed_scripts}| `scientific_contribution.md` | template; MLCommons Science wants a PDF of it |

## What a reviewer will ask

{listed}"""


def contribution_text(runs):
    """scientific_contribution.md: what the PDF has to say, what is known filled in."""
    config = runs[0].results["config"]
    keys = (
        "epochs", "learning_rate", "batch_size", "seed", "PATCH_SIZE", "CROP_SIZE", "MIN_SST",
        "train_split", "clip_offset", "cloud_weight", "precision", "target_accuracy", "patience",
    )  # fmt: skip
    rows = "\n".join(f"| {key} | {json.dumps(config[key])} |" for key in keys)
    return f"""# Scientific contribution

Fill in what stands in brackets, and submit it as PDF (submit.adoc calls it
`sientific_contribution.pdf`).

## Summary

[What is better than in the reference, in two sentences: accuracy, time, less data, ...]

## Model

The U-Net of CloudMask, 39 layers, 1,948,609 parameters, Adam, binary cross-entropy. [Or what was
changed, and why.]

## Data

[The scenes; whether they are the benchmark's; augmentation, if any, and how to repeat it.]

## Hyperparameters

| name | value |
|---|---|
{rows}

## Results

The event `result` of each log holds `val_loss` and `val_accuracy`, of the validation patches at the
epoch with the lowest `val_loss`; `accuracy`, the share of pixels of the `ssts` scenes that agree
with the Bayesian mask, mean over scenes, masked with the model of that epoch; and
`seconds_per_scene`, the time to mask one, reading included. README.md has them beside their
reference values.

[What they mean; where the masks are wrong; whether the difference is more than that between runs.]

## References

[Publications that the approach builds on.]
"""


def write_submission(folder, files, logs, scripts):
    """Write the folder, whole or not at all.

    Raises:
        UserError: If there is one of that name.
    """
    if folder.exists():
        raise UserError(f"{folder} exists. Choose another --descriptor, or remove it.")
    temporary = folder.with_name(f".new-{uuid.uuid4().hex}")
    temporary.mkdir(parents=True)
    try:
        for name, content in files.items():
            write = write_json if name.endswith(".json") else write_text
            write(temporary / name, content)
        for name, source in {**logs, **scripts}.items():
            shutil.copyfile(source, temporary / name)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


# --- the program ----------------------------------------------------------------------------


def parse_arguments(argv):
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("runs", type=Path, nargs="+", metavar="RUN_DIR", help="folder of a run")
    add("--system", required=True, metavar="NAME", help="of the system, for folder and file")
    add("-o", "--output", type=Path, required=True, metavar="DIR", help="folder to write below")
    add(
        "--descriptor",
        default="experiment-1",
        metavar="NAME",
        help="of the experiment (default experiment-1)",
    )
    add("--system-json", type=Path, metavar="FILE", help="what the runs do not know of the system")
    add(
        "--script", type=Path, nargs="+", default=[], action="extend", metavar="FILE",
        help="scripts that the runs were started with, to be put beside run.sh",
    )  # fmt: skip
    add(
        "--reference", nargs="+", default=[], action="extend", metavar="MEASUREMENT=VALUE",
        help="reference values for the table, of your runs of the reference say",
    )  # fmt: skip
    add("--verbose", action="store_true", help="show tracebacks")
    return parser.parse_args(argv)


def read_references(texts):
    """Reference values by measurement; that of accuracy is the convergence target.

    Raises:
        UserError: If one is not MEASUREMENT=VALUE.
    """
    known, found = [name for name, *_ in MEASUREMENTS], {"accuracy": TARGET}
    for text in texts:
        name, _, value = text.partition("=")
        try:
            if name not in known or not math.isfinite(float(value)):
                raise ValueError
            found[name] = float(value)
        except ValueError:
            raise UserError(
                f"--reference takes MEASUREMENT=NUMBER, found '{text}'; measurements are "
                f"{', '.join(known)}."
            ) from None
    return found


def submit(arguments):
    """Check runs and write their submission."""
    for option, name in (("--system", arguments.system), ("--descriptor", arguments.descriptor)):
        if not name or folder_name(name) != name:
            raise UserError(
                f"{option} takes a name of letters, digits and . + - _, found '{name}'."
            )
    references = read_references(arguments.reference)
    given = read_system_json(arguments.system_json) if arguments.system_json else {}
    scripts = {path.name: path for path in arguments.script}
    if len(scripts) < len(arguments.script):
        raise UserError("Two files of --script have one name. Rename one.")
    if missing := [path for path in arguments.script if not path.is_file()]:
        raise UserError(f"No file {missing[0]}. --script names files that start the runs.")
    runs = [read_run(folder) for folder in arguments.runs]
    if faults := faults_of(runs):
        for fault in faults:
            log.error("%s", fault)
        raise UserError(f"{len(faults)} fault(s), see above; nothing was written.")

    folder = Path(
        *(arguments.output, folder_name(runs[0].results["config"]["organisation"]), "cloudmask"),
        *(arguments.system, arguments.descriptor),
    )
    try:
        system, remarks = describe_system(runs[0], arguments.system, given), remarks_on(runs)
        files = {
            "config.yaml": config_text(runs[0]),
            "run.sh": script_text(runs[0], len(runs)),
            f"{arguments.system}.json": system,
            "README.md": readme_text(runs, system, references, remarks, list(scripts)),
            "scientific_contribution.md": contribution_text(runs),
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"results.json is not that of a whole run ({type(error).__name__}: {error}). Take it "
            "from the run again."
        ) from error
    logs = {f"result-{number}.txt": log_file(run) for number, run in enumerate(runs, 1)}
    if taken := scripts.keys() & (files.keys() | logs.keys()):
        raise UserError(
            f"--script {min(taken)} has the name of a file of the submission. Rename it."
        )
    write_submission(folder, files, logs, scripts)
    for remark in remarks:
        log.warning("%s.", remark)
    if unknown := [name for name, value in system.items() if value == UNKNOWN]:
        log.warning(
            "Fill in what the runs do not know, in %s.json or by --system-json: %s.",
            *(arguments.system, ", ".join(unknown)),
        )
    log.info("The submission of %d run(s) is in %s.", len(runs), folder)


def main(argv=None):
    """Run the program and return its exit status."""
    arguments = parse_arguments(argv)
    log_to_screen(arguments.verbose)
    return exit_status(lambda: submit(arguments), arguments.verbose)


if __name__ == "__main__":
    sys.exit(main())
