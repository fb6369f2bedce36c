"""Make one HTML page of a run, or of several; it needs no network.

    python tools/report.py RUN_DIR                      # RUN_DIR/report.html
    python tools/report.py RUN_DIR RUN_DIR -o report.html
    python tools/report.py RUN_DIR --all-scenes         # pictures of every scene, not of 21
    python tools/report.py RUN_DIR --pictures figures   # one PNG per scene

For one run the page shows both metrics with baselines and target, what ran where, training curves,
times, pictures of scenes at full resolution, the scores of each scene, calibration if the run kept
probabilities, and the samples of the machine. Scenes that would make the page exceed 12 MB
are in report_scenes beside it. For several runs it shows a table, curves, and the differences in
configuration, commit, devices and versions. A run that was stopped has a report too; the page says
what is missing.
"""

import argparse
import logging
import sys
from pathlib import Path

from _command import exit_status
from harness.console import counted, log_to_screen

log = logging.getLogger("report")


def parse_arguments(argv):
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("runs", type=Path, nargs="+", metavar="RUN_DIR", help="folder of a run")
    add("-o", "--output", type=Path, help="file to write (default: RUN_DIR/report.html of one run)")
    add("--data", type=Path, help="folder of the scene files (default: the run's inference_dir)")
    add("--pictures", type=Path, metavar="DIR", help="write PNG pictures to DIR instead of a page")
    add("--all-scenes", action="store_true", help="draw every scene; the default is at most 21")
    add("--verbose", action="store_true", help="show tracebacks")
    arguments = parser.parse_args(argv)
    if len(arguments.runs) > 1 and (arguments.pictures or not arguments.output):
        parser.error("several runs need -o FILE; --pictures takes one run")
    if len(arguments.runs) > 1 and (arguments.data or arguments.all_scenes):
        parser.error("a page of several runs has no pictures: omit --data and --all-scenes")
    if arguments.pictures and arguments.output:
        parser.error("--pictures writes no page: omit -o")
    return arguments


def make(arguments):
    """Make the page or the pictures."""
    from harness.records import report

    runs = arguments.runs
    if arguments.pictures:
        n = report.write_pictures(runs[0], arguments.pictures, arguments.data)
        log.info("Pictures of %s are in %s", counted(n, "scene"), arguments.pictures)
    elif len(runs) == 1:
        page = report.make_report(
            runs[0], *(arguments.data, arguments.output, arguments.all_scenes)
        )
        log.info("Report: %s", page)
    else:
        log.info("Report: %s", report.make_comparison(runs, arguments.output))


def main(argv=None):
    """Run the command and return its exit status."""
    arguments = parse_arguments(argv)
    log_to_screen(arguments.verbose)
    return exit_status(lambda: make(arguments), arguments.verbose)


if __name__ == "__main__":
    sys.exit(main())
