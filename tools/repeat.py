r"""Make runs that repeat one another, compare them, and make a submission of them.

    python tools/repeat.py --config config.yaml --repeats 10 -o outputs/series --system rivanna-a100
    python tools/repeat.py -o outputs/seeds --seeds 1 2 3 --set epochs=100
    python tools/repeat.py -o outputs/series --launch 'env SBATCH_WAIT=1 target/slurm.sh'

The runs are in DIR/run-1, DIR/run-2 and so on. The same command continues a series: runs that have
finished are kept, an aborted one is resumed, or repeated if it cannot be resumed. At the end, also
if a run fails, DIR/comparison.md has the tables of tools/compare.py; with --system and all runs
finished, tools/submission.py writes below DIR/submission, where an existing submission is kept. The
runs of a submission have the same seed; --seeds shows how much results depend on it.
"""

import argparse
import logging
import sys
from pathlib import Path

from _command import exit_status
from harness.config import load_config, resolved
from harness.console import counted, log_to_screen
from harness.errors import UserError
from harness.records.run_folder import git_commit
from harness.signals import install_handlers
from tools import compare, submission
from tools.lib.options import positive
from tools.lib.series import PlannedRun, add_run_arguments, make_runs, when_stopped

log = logging.getLogger("repeat")


def plan(arguments):
    """The runs to make, as PlannedRuns."""
    changes = {}  # {name of the run: KEY=VALUE texts}
    for n in range(1, arguments.repeats + 1):
        for seed in arguments.seeds:
            changes[f"seed-{seed}-run-{n}"] = [f"seed={seed}"]
        if not arguments.seeds:
            changes[f"run-{n}"] = []
    config, launch = arguments.config, arguments.launch
    return [
        PlannedRun(arguments.output / name, config, [*arguments.set, *changed], launch=launch)
        for name, changed in changes.items()
    ]


def parse_arguments(argv):
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("-o", "--output", type=Path, required=True, metavar="DIR", help="folder of the series")
    add("--repeats", type=positive, help="runs, of each seed (default 10, or 1 with --seeds)")
    add("--seeds", type=int, nargs="+", default=[], metavar="SEED", help="seeds of the runs")
    add("--launch", help="command that starts the program, waits for it and takes its options")
    add(
        "--system", type=submission.plain_name, metavar="NAME",
        help="make a submission: name of the system",
    )  # fmt: skip
    add_run_arguments(add)
    arguments = parser.parse_args(argv)
    if arguments.seeds and arguments.system:
        parser.error("the runs of a submission have the same seed: remove --seeds or --system")
    arguments.repeats = arguments.repeats or (1 if arguments.seeds else 10)
    return arguments


def work(arguments):
    """Make the runs, compare them and make the submission."""
    runs, system = plan(arguments), arguments.system
    # Mistakes are reported before a run starts.
    config = load_config(arguments.config, runs[0].changes)
    if system and not all(run.has_finished for run in runs):
        check_submission(config)

    def summarise(finished):
        if finished:
            table = arguments.output / "comparison.md"
            options = ["-o", str(table), *["--any-seed"] * bool(arguments.seeds)]
            compare.work(compare.parse_arguments([*map(str, finished), *options]))
            log.info("Compared %d of %d runs: %s", len(finished), len(runs), table)

    make_runs(runs, resume=True, summarise=summarise)
    if system:
        submit([str(run.folder) for run in runs], arguments.output / "submission", config, system)


def check_submission(config):
    """Raise UserError if no run with this configuration and code could be submitted.

    What the submission would only note is printed.
    """
    faults = [*submission.commit_faults(git_commit()), *submission.setting_faults(config)]
    for fault in faults:
        log.error("%s.", fault)
    if faults:
        raise UserError(
            f"{counted(len(faults), 'fault')}, see above, for which a submission would be "
            "rejected; no run was started. Fix this or omit --system."
        )
    for note in submission.setting_notes(resolved(config)):
        log.warning("%s.", note)


def submit(runs, output, config, system):
    """Make the submission of runs, unless it exists."""
    folder = submission.submission_folder(output, config.organisation, system)
    if folder.exists():
        log.info("Kept the submission in %s; remove it to have it written again.", folder)
    elif submission.main([*runs, "-o", str(output), "--system", system]):
        raise UserError(f"No submission was written, see above. The runs are in {output.parent}.")


def main(argv=None):
    """Run the command and return its exit status."""
    arguments = parse_arguments(argv)
    log_to_screen(arguments.verbose)
    install_handlers()
    again = when_stopped("The same command continues the series.", arguments.launch)
    return exit_status(lambda: work(arguments), arguments.verbose, again)


if __name__ == "__main__":
    sys.exit(main())
