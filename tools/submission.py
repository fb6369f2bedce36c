r"""Turn runs into a submission to MLCommons Science: check them, then write the folder.

    python tools/submission.py RUN_DIR ... --system NAME -o DIR
    python tools/submission.py outputs/run-* --system rivanna-a100 --descriptor experiment-2 \
        --system-json rivanna.json --script my_job.sh -o submission

Writes DIR/{organisation}/cloudmask/{system}/{descriptor}/ with

    result-1.txt ...             the MLPerf log of each run
    config.yaml                  the configuration of all runs, with the code's commit
    run.sh, my_job.sh ...        repeats the runs; the files of --script
    {system}.json                the system, in the fields of MLPerf
    README.md                    table: measurement, reference value, submitted value; how to run
    scientific_contribution.md   a template to fill in and submit as PDF

Nothing is written unless all runs pass: each ended in success with training and inference; its log
is unchanged (SHA-256 in results.json), passes the compliance checker of mlperf_logging with
harness/mlperf_rules.yaml and agrees with results.json, history.csv and scenes.csv; all runs have
the same configuration, devices, versions, scenes and commit, without uncommitted changes.

The rules are in submit.adoc and policy.adoc of https://github.com/mlcommons/science. A single run
is sufficient if it is documented how it was obtained; repeats are recommended. If the runs were
chosen from more, say so with --best-of. All runs have the same seed, unlike in MLPerf Training,
because one config.yaml defines them. The system is described by what the first run recorded of its
first node, not by the machine of this command.
"""

import argparse
import contextlib
import json
import logging
import math
import os
import re
import shutil
import statistics
import sys
from dataclasses import replace
from pathlib import Path

from _command import exit_status  # isort: skip  (before all packages)

import yaml
from mlperf_logging.mllog import constants

from harness.config import (
    FILE_KEYS,
    FOLDER_KEYS,
    Config,
    check,
    load_config,
    parse_override,
    recorded,
    resolved,
)
from harness.console import counted, format_bytes, log_to_screen, printable
from harness.errors import UserError
from harness.files import file_sha256, new_folder, read_text, write_json, write_text
from harness.inference.scores import TARGET_ACCURACY, compare_with_baselines
from harness.records.resume import DAMAGED
from harness.records.saved_runs import MEASURES, Measure, differences, measures, read_run
from tools.lib.log_check import CHECKS, log_file, read_events
from tools.lib.markdown import markdown, markdown_table
from tools.lib.options import command_parser

TEMPLATES = Path(__file__).parent / "lib" / "submission_files"
DESCRIPTOR = "experiment-1"
RUNS_RECOMMENDED = 10  # of CloudMask, policy.adoc, 'Benchmark Results'
CONTACT = ("name", "email", "submission")  # keys that --set adds to runs without them
SCENES = {"train_dir": 970, "inference_dir": 100}  # of the benchmark's data, one-day and ssts
# The closed division leaves epochs, learning_rate, batch_size and MIN_SST free, policy.adoc.
FIXED_IN_CLOSED = (
    "image_h", "image_w", "n_channels", "patch_size", "crop_size", "seed", "train_split",
    "clip_offset", "cloud_weight", "inference_mode", "no_data", "network", "loss", "labels",
    "label_correction", "augment",
)  # fmt: skip
UNKNOWN, NONE = "unknown: fill in", "none"
# All fields that mlperf_logging's system_desc_checker requires (MLPerf HPC), UNKNOWN.
SYSTEM = json.loads((TEMPLATES / "system.json").read_text(encoding="utf-8"))
SYSTEM_JSON_FIELDS = list(SYSTEM)[4:]  # the first four come from the runs and --system
SECONDS = Measure("time to train", "{:.1f}".format, "From run_start to the last eval_stop [s].")
MEASUREMENTS = {"time_to_train": SECONDS} | MEASURES

log = logging.getLogger("submission")


def find_faults(runs):
    """Everything that keeps runs from being submitted, as texts that name the run."""
    found, logs = [], {}
    for run in runs:
        found += [f"{run.folder}: {text}" for text in run_faults(run)]
        first = logs.setdefault(str(run.results.get("mlperf_sha256", run.folder)), run)
        if first is not run:
            found.append(f"{first.folder} and {run.folder} are the same run. Name each run once")
    for place, values in differences([run for run in runs if run.status == "success"]).items():
        shown = ", ".join(dict.fromkeys(map(json.dumps, values)))
        found.append(f"The runs should be repeats, but {place} differs: {shown}")
    return [printable(text) for text in found]


def run_faults(run):
    """Everything that is wrong with one run, as texts."""
    if (run.status, mode := run.results.get("mode")) != ("success", "benchmark"):
        return [f"it is '{run.status}' in --mode {mode}, expected 'success' in --mode benchmark"]
    found = []
    for find in (code_faults, config_faults, *CHECKS):
        try:
            found += find(run)
        except DAMAGED as error:
            reason = f"{type(error).__name__}: {error}"
            found.append(f"its files are not those of a complete run ({reason})")
    return list(dict.fromkeys(found))


def code_faults(run):
    """Check that the code of a run is known, and the same in all its parts."""
    return commit_faults(run.results["git_commit"]) or [
        f"{name} changed when it was resumed. Run it again"
        for name in ("git_commit", "versions", "devices")
        if any(part.get(name) != run.results[name] for part in run.results["parts"])
    ]


def commit_faults(commit):
    """Check a commit, as of run_folder.git_commit: it must be known and without changes."""
    if re.fullmatch("[0-9a-f]{40}", str(commit)):
        return []
    return [f"the commit is {commit}. Commit all changes in a git checkout and run again"]


def config_faults(run):
    """Check that the configuration is that of results.json, and suits its division."""
    try:
        config = load_config(run.folder / "config.yaml")
        stored = resolved(check(run.results["config"], run.folder / "results.json"))
    except UserError as error:
        return [str(error)]
    found = [
        f"config.yaml has {key} {value}, expected {stored[key]} by results.json"
        for key, value in resolved(config).items()
        if key not in FOLDER_KEYS and value != stored[key]
    ]
    return found + setting_faults(config, run)


def setting_faults(config, run=None):
    """Check who submits what, and the division; its scenes are checked if there is a run yet."""
    found = []
    if not folder_name(config.organisation) or config.organisation == "unknown":
        found.append(f"organisation is '{config.organisation}'. Set it and run again")
    if config.benchmark.lower() != "cloudmask":
        found.append(f"benchmark is '{config.benchmark}', expected cloudmask")
    if config.division not in ("open", "closed"):
        found.append(f"division is '{config.division}', expected open or closed")
    return found + (closed_faults(config, run) if config.division == "closed" else [])


def closed_faults(config, run=None):
    """What the closed division does not allow."""
    reference, found = Config(), scene_faults(run) if run else []
    for key in FIXED_IN_CLOSED:
        if (value := getattr(config, key)) != (expected := getattr(reference, key)):
            found.append(f"{Config.model_fields[key].alias} {expected}, found {value}")
    if config.min_sst < reference.min_sst:
        found.append(f"MIN_SST of at least {reference.min_sst}, found {config.min_sst}")
    return [f"the closed division requires {text}" for text in found]


def scene_faults(run):
    """Differences in number from the benchmark's scenes."""
    n_train = run.results["training"]["scenes_train"] + run.results["training"]["scenes_test"]
    numbers = {"train_dir": n_train, "inference_dir": run.results["inference"]["scenes"]}
    return [f"{SCENES[k]} scenes in {k}, found {n}" for k, n in numbers.items() if n != SCENES[k]]


def contact(config):
    """The values of CONTACT in the configuration of a run, empty where they are missing."""
    return {key: config[key] for key in CONTACT[:2]} | {
        "submission": config["submission"]["version"]
    }


def add_contact(run, texts):
    """The run with who submits it, where its configuration lacks that.

    Args:
        run: Run.
        texts: `KEY=VALUE` texts of keys of CONTACT.

    Raises:
        UserError: If they name other keys, or the run has another value.
    """
    given, config = dict(map(parse_override, texts)), run.results["config"]
    if wrong := given.keys() - set(CONTACT):
        raise UserError(
            f"--set takes {', '.join(CONTACT)}, found {min(wrong)}: what a run did cannot be "
            "changed. Run it again."
        )
    changed = recorded(check(config | given, "--set", given))
    found, wanted = contact(config), contact(changed)
    if other := [key for key in given if found[key] not in (None, "", wanted[key])]:
        raise UserError(
            f"--set {other[0]}: the runs have {found[other[0]]!r}. Omit it, or run again."
        )
    return replace(run, results=run.results | {"config": changed})


def setting_notes(config):
    """What MLCommons Science asks for and a configuration lacks, which is no fault."""
    missing = [key for key, value in contact(config).items() if not value]
    notes = [
        f"MLCommons Science asks for {key}, found none; tools/submission.py --set {key}=... adds it"
        for key in missing
    ]
    if config["platform"] == "unknown":
        notes.append("The platform in the logs is 'unknown'")
    return notes


def reviewer_notes(runs, system):
    """In what the runs differ from the official benchmark, and what a reviewer will ask about."""
    config = runs[0].results["config"]
    notes = [f"The official benchmark has {text}" for text in scene_faults(runs[0])]
    notes += setting_notes(config)
    if len(runs) < RUNS_RECOMMENDED:
        notes.append(
            f"MLCommons Science recommends {RUNS_RECOMMENDED} runs of CloudMask, found "
            f"{len(runs)}; a single one is sufficient if it is documented how it was obtained"
        )
    if any(run.is_synthetic for run in runs):
        notes.append("The scenes are synthetic; results on them are no results of the benchmark")
    notes += [f"{run.name}: {text.rstrip('.')}" for run in runs for text in run.warnings]
    if n_bad := sum(len(run.results.get("bad_scenes") or []) for run in runs):
        notes.append(f"Unreadable scenes were skipped, {counted(n_bad, 'time')} in all runs")
    if unknown := ", ".join(name for name, value in system.items() if value == UNKNOWN):
        notes.append(f"The runs did not record these fields; use --system-json: {unknown}")
    if not all(map(cache_was_cleared, runs)):
        notes.append(
            "cache_clear is false in the logs; the policy asks for an emptied file cache before "
            "each run"
        )
    return notes


def cache_was_cleared(run):
    """Whether the log says that the file cache was emptied before the run."""
    values = [e.value["value"] for e in read_events(run)[0] if e.key == constants.CACHE_CLEAR]
    return values == [True]


def describe_system(run, system, given):
    """Describe the system in the fields of MLPerf.

    Args:
        run: Run that ended in success.
        system: Its name.
        given: Fields from the user; they take precedence over those that the run recorded.
    """
    results = run.results
    config, devices, machine = results["config"], results["devices"], results.get("machine") or {}
    gpus, memory, sockets = machine.get("gpus") or [], machine.get("memory"), machine.get("sockets")
    cores, threads = machine.get("cores"), machine.get("threads")
    versions = results["versions"]
    if gpus:
        versions = versions | {"NVIDIA driver": _join(gpu["driver"] for gpu in gpus)}
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
        "accelerators_per_node": devices["accelerators_per_node"],
        "framework": f"TensorFlow {versions['tensorflow']}, Keras {versions['keras']}",
        "other_software_stack": versions,
        "operating_system": ", ".join(
            machine[key] for key in ("operating_system", "kernel") if machine.get(key)
        ),
        "hw_notes": f"as the run detected it: {devices['description']}",
        "sw_notes": f"CloudMask, commit {results['git_commit']}",
    }
    if devices["accelerators_per_node"] == 0:
        known |= {key: NONE for key in SYSTEM if key.startswith("accelerator_")}
    elif gpus:
        known["accelerator_model_name"] = _join(gpu["name"] for gpu in gpus)
        known["accelerator_memory_capacity"] = _join(format_bytes(gpu["memory"]) for gpu in gpus)
    if devices["nodes"] == 1:
        known |= {"host_networking": NONE, "host_networking_topology": NONE}
    known = {key: value for key, value in (known | given).items() if value not in (None, "")}
    return SYSTEM | {key: _as_texts(value) for key, value in known.items()}


def _join(texts):
    return ", ".join(sorted(set(texts)))


def _as_texts(value):
    """A text or a dictionary of texts, which MLPerf's programs read."""
    return {k: str(v) for k, v in value.items()} if isinstance(value, dict) else str(value)


def read_system_json(path):
    """Read the fields of the system that the user gives; UserError if they are not such fields."""
    try:
        given = dict(json.loads(read_text(path)))
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f'{path} should contain {{"field": "text", ...}}: {error}.') from None
    if wrong := [key for key in given if key not in SYSTEM_JSON_FIELDS]:
        raise UserError(
            f"{path} has the field '{wrong[0]}', expected some of {', '.join(SYSTEM_JSON_FIELDS)}."
        )
    return given


def folder_name(text):
    """A name for folders and git: other characters than letters, digits and . + - become _."""
    return re.sub(r"[^\w.+-]+", "_", text, flags=re.ASCII).strip("._")


def submission_folder(output, organisation, system, descriptor=DESCRIPTOR):
    """The folder that a submission is written to."""
    return Path(output) / folder_name(organisation) / "cloudmask" / system / descriptor


def config_text(run):
    """config.yaml of the submission: that of the runs, with the commit."""
    values = resolved(load_config(run.folder / "config.yaml"))
    values |= {key: run.results["config"][key] for key in CONTACT}
    values["output_dir"] = "outputs"
    for key in FILE_KEYS:
        if os.path.isabs(values[key]):  # the second run would meet the file of the first
            values[key] = os.path.basename(values[key])
    values["submission"]["github_commit_version"] = run.results["git_commit"]
    header = "# The configuration of all runs of this submission; run.sh repeats them.\n"
    return header + yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def time_to_train(run):
    """Seconds from run_start to the end of the last validation, from the MLPerf log."""
    times = {event.key: event.timestamp / 1000 for event in read_events(run)[0]}  # last of each key
    return times["eval_stop"] - times["run_start"]


def how_obtained(accuracies, n_made):
    """How the result was obtained, as sentences.

    Args:
        accuracies: Accuracy of each run.
        n_made: Number of runs that these were chosen from as the best; None if it is not known.
    """
    n, best = len(accuracies), max(accuracies)
    if n == 1:
        text = "The result of a single run."
    else:
        text = (
            f"Mean and standard deviation of {n} runs. The best of the {n} by accuracy is "
            f"`result-{accuracies.index(best) + 1}.txt`, {MEASURES['accuracy'].show(best)}."
        )
    if n_made:
        text += f" {'It is' if n == 1 else 'They are'} the best of {n_made} that were made."
    return text


def baseline_table(means):
    """Table of mask and baselines on the same pixels, in Markdown."""
    show = MEASURES["accuracy"].show
    rows = [
        [what, *(NONE if value is None else show(value) for value in values)]
        for what, values in compare_with_baselines(means).items()
    ]
    return markdown_table(["agreement with the label", "mask", "all cloud", "threshold"], rows)


def readme_text(runs, system, references, notes, scripts, n_made=None):
    """README.md of the submission.

    Args:
        runs: Runs.
        system: Its name.
        references: {measurement: reference value}.
        notes: Texts of `reviewer_notes`.
        scripts: Names of the files of --script.
        n_made: See `how_obtained`.
    """
    measured = [measures(run) | {"time_to_train": time_to_train(run)} for run in runs]
    rows, deltas = [], []  # deltas: differences of accuracies from their references
    means = dict.fromkeys(MEASUREMENTS)
    for name, measure in MEASUREMENTS.items():
        values, reference = [values[name] for values in measured], references.get(name)
        if None in values:
            continue
        means[name] = mean = statistics.mean(values)
        spread = f" ± {measure.show(statistics.stdev(values))}" if len(values) > 1 else ""
        shown = NONE if reference is None else measure.show(reference)
        rows.append([name, shown, measure.show(mean) + spread, measure.meaning])
        if reference is not None and name.endswith("accuracy"):
            deltas.append(mean - reference)
    heads = ["measurement", "reference value", "submitted value", "meaning"]
    columns = ("accuracy", "epochs", "time_to_train")
    run_rows = [
        [f"result-{n}.txt", run.results["start"]]
        + [MEASUREMENTS[name].show(values[name]) for name in columns]
        + [file_sha256(log_file(run))]
        for n, (run, values) in enumerate(zip(runs, measured, strict=True), 1)
    ]
    template = (TEMPLATES / "README.template.md").read_text(encoding="utf-8")
    return template.format(
        measurements=markdown_table(heads, rows),
        runs=markdown_table(["run", "start", *columns, "SHA-256 of the log"], run_rows),
        scripts="".join(f"| {markdown(name)} | script of the system |\n" for name in scripts),
        notes="\n".join(f"- {markdown(text)}" for text in notes),
        baselines=baseline_table(means),
        how_obtained=how_obtained([values["accuracy"] for values in measured], n_made),
        n_runs=counted(len(runs), "run"),
        n_reached=sum(values["accuracy"] >= TARGET_ACCURACY for values in measured),
        target=TARGET_ACCURACY,
        n_references=counted(len(deltas), "accuracy value"),
        synthetic="synthetic, " if any(run.is_synthetic for run in runs) else "",
        cache="emptied" if all(map(cache_was_cleared, runs)) else "not emptied",
        difference=f"{statistics.mean(deltas):+.4f}",
        system=system,
        results=_escape(runs[0].results),
    )


def _escape(value):
    """Nested dictionaries with all values as Markdown."""
    if isinstance(value, dict):
        return {key: _escape(item) for key, item in value.items()}
    return NONE if value in (None, "") else markdown(str(value))


def plain_name(text):
    """Argument of --system and --descriptor."""
    if not text or folder_name(text) != text:
        raise argparse.ArgumentTypeError(f"expected letters, digits and . + - _, found '{text}'")
    return text


def reference_value(text):
    """Argument of --reference: (measurement, number)."""
    name, _, number = text.partition("=")
    with contextlib.suppress(ValueError):
        if name in MEASUREMENTS and math.isfinite(float(number)):
            return name, float(number)
    raise argparse.ArgumentTypeError(
        f"expected MEASUREMENT=NUMBER, found '{text}'; measurements are {', '.join(MEASUREMENTS)}"
    )


def submit(arguments):
    """Check runs and write their submission."""
    given = read_system_json(arguments.system_json) if arguments.system_json else {}
    runs = [read_run(folder) for folder in arguments.runs]
    if faults := find_faults(runs):
        for fault in faults:
            log.error("%s.", fault)
        raise UserError(f"{counted(len(faults), 'fault')}, see above; nothing was written.")
    runs = [add_contact(run, arguments.set) for run in runs]
    if arguments.best_of is not None and arguments.best_of < len(runs):
        raise UserError(
            f"--best-of is the number of runs that these {len(runs)} were chosen from, found "
            f"{arguments.best_of}. Omit it if no others were made."
        )

    scripts = {path.name: path for path in arguments.script}
    references = {"accuracy": TARGET_ACCURACY} | dict(arguments.reference)
    try:
        system = describe_system(runs[0], arguments.system, given)
        notes = reviewer_notes(runs, system)
        files = {
            "config.yaml": config_text(runs[0]),
            f"{arguments.system}.json": system,
            "README.md": readme_text(
                runs, arguments.system, references, notes, scripts, arguments.best_of
            ),
        }
    except DAMAGED as error:
        raise UserError(f"results.json is not that of a complete run ({error!r}).") from error
    copies = {f"result-{number}.txt": log_file(run) for number, run in enumerate(runs, 1)}
    copies |= {name: TEMPLATES / name for name in ("run.sh", "scientific_contribution.md")}
    if len(scripts) < len(arguments.script) or scripts.keys() & (files.keys() | copies.keys()):
        names = ", ".join(path.name for path in arguments.script)
        raise UserError(f"--script {names}: two files of the submission have one name. Rename one.")
    organisation = runs[0].results["config"]["organisation"]
    place = arguments.output, organisation, arguments.system, arguments.descriptor
    folder = submission_folder(*place)
    if folder.exists():
        raise UserError(f"{folder} exists. Choose another --descriptor or remove it.")
    with new_folder(folder) as temporary:
        for name, content in files.items():
            write = write_text if isinstance(content, str) else write_json
            write(temporary / name, content)
        for name, source in (copies | scripts).items():
            shutil.copyfile(source, temporary / name)
    log.info("The submission of %s is in %s.", counted(len(runs), "run"), folder)
    log.info("%s for reviewers, also in its README.md; no fault:", counted(len(notes), "note"))
    for note in notes:
        log.warning("%s.", note)


def main(argv=None):
    """Run the program and return its exit status."""
    parser = command_parser(__doc__)
    add, several = parser.add_argument, {"nargs": "+", "default": [], "action": "extend"}
    add("runs", type=Path, nargs="+", metavar="RUN_DIR", help="folder of a run")
    add("--system", type=plain_name, required=True, metavar="NAME", help="name of the system")
    add("-o", "--output", type=Path, required=True, metavar="DIR", help="folder to write below")
    add(
        "--descriptor", type=plain_name, default=DESCRIPTOR, metavar="NAME",
        help=f"name of the experiment (default {DESCRIPTOR})",
    )  # fmt: skip
    add("--best-of", type=int, metavar="N", help="the runs are the best of N that were made")
    add(
        "--set", **several, metavar="KEY=VALUE",
        help="name, email or 'submission={version: ...}', if the runs have none",
    )  # fmt: skip
    add("--system-json", type=Path, metavar="FILE", help='{"field": "text", ...} not in the runs')
    add("--script", type=Path, **several, metavar="FILE", help="files to copy next to run.sh")
    add(
        "--reference", type=reference_value, **several, metavar="MEASUREMENT=VALUE",
        help="reference values for the table, for example of your runs of the reference",
    )  # fmt: skip
    arguments = parser.parse_args(argv)
    log_to_screen(arguments.verbose)
    return exit_status(lambda: submit(arguments), arguments.verbose)


if __name__ == "__main__":
    sys.exit(main())
