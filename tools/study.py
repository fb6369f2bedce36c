r"""Compare networks, or any settings: many runs with one budget, and a page of what they reach.

    python tools/study.py target/study-demo.yaml
    python tools/study.py target/study-real.yaml --launch 'env SBATCH_WAIT=1 target/slurm.sh'
    python tools/study.py FILE.yaml --page-only

A study is a YAML file:

    output: demo/study           # folder of the runs and the page
    config: target/demo.yaml     # configuration of all runs
    set: {augment: flips}        # keys that all runs change
    budget: {epochs: 5}          # of a run; or {seconds: 600} of training and validation
    seeds: [1, 2, 3]
    vary:                        # keys, and values of which all combinations are run
      network: [unet, stem_2x2]
      precision: [float32, bfloat16]

`vary` may be a list of such groups, whose runs come one after the other. The first combination is
what speeds are compared with. All are run with the first seed before any is run with the second.

The runs are in OUTPUT/runs. The same command continues a study: runs that have finished are kept,
an aborted one is resumed or repeated. A run that fails is reported, and the others are made. At the
end OUTPUT/study.html has the table, with mean and standard deviation over the seeds, and charts of
accuracy over seconds per scene and over training seconds; OUTPUT/runs.csv has a row per run, with
the keys that vary. Scenes that contain `truth`, as synthetic ones do, are also scored against it;
nothing is trained on it.
"""

import argparse
import itertools
import json
import logging
import sys
from collections import Counter
from pathlib import Path
from typing import Annotated

from _command import exit_status  # isort: skip  (before all packages)

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from harness.config import Count, Number, load_config, parse_override, read_yaml
from harness.console import counted, log_to_screen
from harness.errors import UserError
from harness.preflight import check_model
from harness.signals import install_handlers
from tools.lib.series import PlannedRun, make_runs, when_stopped

MOST_EPOCHS = 100_000  # of a run that ends after its seconds
OWN_KEYS = {"epochs", "training_seconds", "seed", "output_dir", "run_name"}

log = logging.getLogger("study")


class Budget(BaseModel):
    """What each run may use: `epochs` or `seconds`."""

    model_config = ConfigDict(extra="forbid")

    epochs: Count | None = None
    seconds: Annotated[float, Number, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _one(self):
        if (self.epochs is None) == (self.seconds is None):
            raise ValueError("should be either epochs or seconds")
        return self

    def __str__(self):
        return counted(self.epochs, "epoch") if self.epochs else f"{self.seconds:g} s of training"

    @property
    def changes(self):
        """The budget as keys of the configuration."""
        if self.epochs:
            return {"epochs": self.epochs}
        return {"epochs": MOST_EPOCHS, "training_seconds": self.seconds}


class Study(BaseModel):
    """A study file, see the top of this module."""

    model_config = ConfigDict(extra="forbid")

    output: Path
    config: Path = Path("config.yaml")
    set: dict = {}
    budget: Budget
    seeds: Annotated[list[Annotated[int, Number]], Field(min_length=1)]
    vary: dict[str, list] | list[dict[str, list]]

    @model_validator(mode="after")
    def _reject_impossible_combinations(self):
        keys = {*self.set, *(key for group in self.groups for key in group)}
        if own := sorted(keys & OWN_KEYS):
            raise ValueError(
                f"{', '.join(own)} cannot be set or varied: output, budget and seeds say it"
            )
        if not self.groups or not all(group and all(group.values()) for group in self.groups):
            raise ValueError("vary has no key, or a key without values")
        if twice := [str(seed) for seed, n in Counter(self.seeds).items() if n > 1]:
            raise ValueError(f"seeds has the same seed twice: {', '.join(twice)}")
        named = {}
        for case in self.cases:
            name = case_name(case)
            if (other := named.setdefault(name, case)) is case:
                continue
            if other == case:
                raise ValueError(f"vary has the same combination twice: {name}")
            raise ValueError(
                f"{name} would be the name of two combinations of vary, {other} and {case}: put "
                "one of them into a study of its own"
            )
        return self

    @property
    def groups(self):
        """`vary` as a list."""
        return self.vary if isinstance(self.vary, list) else [self.vary]

    @property
    def cases(self):
        """All combinations, {key: value} each."""
        return [
            dict(zip(group, values, strict=True))
            for group in self.groups
            for values in itertools.product(*group.values())
        ]


def case_name(case):
    """A combination as the name of a folder and of a row: 'stem_2x2-bfloat16'."""
    return "-".join(
        Path(str(value)).stem if "/" in str(value) else str(value) for value in case.values()
    )


def read_study(path, output=None, overrides=()):
    """Read a study file; UserError with all its errors.

    Args:
        path: The file.
        output: Another folder than that in the file.
        overrides: `KEY=VALUE` texts that win over its `set`.
    """
    values = read_yaml(path)
    if output:
        values["output"] = output
    values["set"] = values.get("set") or {}  # `set:` without a key is None
    if isinstance(values["set"], dict):
        values["set"] |= dict(map(parse_override, overrides))
    try:
        return Study.model_validate(values)
    except ValidationError as error:
        lines = (
            ": ".join([*map(str, e["loc"]), e["msg"].removeprefix("Value error, ")])
            for e in error.errors()
        )
        raise UserError(f"{path}: {'; '.join(lines)}. See --help.") from None


def plan(study, launch):
    """The runs to make: {name of the run: (name of its case, PlannedRun)}.

    Raises:
        UserError: If a configuration is wrong, before a run starts.
    """
    runs = {}
    for seed, case in itertools.product(study.seeds, study.cases):
        values = {**study.set, **case, **study.budget.changes, "seed": seed}
        changes = [f"{key}={json.dumps(value)}" for key, value in values.items()]  # JSON is YAML
        check_model(load_config(study.config, changes), "benchmark")
        name = f"{case_name(case)}-seed-{seed}"
        folder = study.output / "runs" / name
        runs[name] = case_name(case), PlannedRun(folder, str(study.config), changes, launch=launch)
    return runs


def summarise(title, study, runs):
    """Write the page of the runs that have finished."""
    finished = {name: pair for name, pair in runs.items() if pair[1].has_finished}
    if not finished:
        return
    from tools.lib.study import PAGE, measure, write_study

    log.info("Scoring %d of %d runs ...", len(finished), len(runs))
    order = [case_name(case) for case in study.cases]
    measured = [measure(case, run.folder) for case, run in finished.values()]
    measured.sort(key=lambda run: order.index(run.case))
    missing = [name for name in runs if name not in finished]
    varied = dict.fromkeys(key for group in study.groups for key in group)
    text = write_study(title, measured, str(study.budget), varied, study.output, missing)
    sys.stdout.write(text + "\n")
    log.info("Study: %s", study.output / PAGE)


def parse_arguments(argv):
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("study", type=Path, metavar="FILE.yaml", help="the study")
    add("-o", "--output", type=Path, metavar="DIR", help="another folder than that in the file")
    add("--set", nargs="+", default=[], metavar="KEY=VALUE", help="change `set` of the study")
    add("--launch", help="command that starts the program, waits for it and takes its options")
    add("--page-only", action="store_true", help="make no runs: only the page of the finished ones")
    add("--verbose", action="store_true", help="show tracebacks")
    return parser.parse_args(argv)


def work(arguments):
    """Make the runs that are missing, and the page."""
    study = read_study(arguments.study, arguments.output, arguments.set)
    runs = plan(study, arguments.launch)

    def page(_):
        summarise(arguments.study.stem, study, runs)

    if arguments.page_only:
        if not any(run.has_finished for _, run in runs.values()):
            raise UserError(f"No run in {study.output}/runs has finished. Omit --page-only.")
        return page(None)
    make_runs([run for _, run in runs.values()], True, page, keep_going=True)


def main(argv=None):
    """Run the command and return its exit status."""
    arguments = parse_arguments(argv)
    log_to_screen(arguments.verbose)
    install_handlers()
    again = when_stopped("The same command continues the study.", arguments.launch)
    return exit_status(lambda: work(arguments), arguments.verbose, again)


if __name__ == "__main__":
    sys.exit(main())
