r"""Compare scenes with what is published about the real ones.

    python tools/compare_scenes.py data/ssts

Prints a table of quantities of all scenes below a folder: the published value, the range that
synthetic scenes should be in, the value here. Exits with 1 if one is outside its range. The ranges
are for about 100 scenes; tools/lib/scenes/facts.py says where the values are from. Quantities that
need `truth` are omitted for scenes without it, and those of daylight if all are in `night`.

A second table shows where the label is wrong, if the scenes say what is there: the share of cloud
that it misses by cloud regime, and of clear pixels that it calls cloud by surface.
"""

import sys
from pathlib import Path

from _command import exit_status
from harness.console import counted, log_to_screen, progress, table
from harness.data.scene_files import find_scenes
from harness.errors import Failure
from tools.lib.options import command_parser


def compare(folder):
    """Print how the scenes below a folder compare with FACTS.

    Raises:
        Failure: If a quantity is outside its range.
    """
    from tools.lib.scenes import facts

    paths = find_scenes(folder)
    scenes = [facts.scene_statistics(path) for path in progress(paths, "Reading", len(paths))]
    found = facts.summarise(scenes)
    known = {name: fact for name, fact in facts.FACTS.items() if name in found}
    outside = [name for name, fact in known.items() if not fact.contains(found[name])]
    columns = {
        "reference": {
            name: f"{fact.reference:9.3f}".replace("nan", "  -") for name, fact in known.items()
        },
        "range": {name: f"{fact.low:8.3f} to {fact.high:.3f}" for name, fact in known.items()},
        counted(len(paths), "scene"): {name: f"{found[name]:9.3f}" for name in known},
        "in range": {name: "no" if name in outside else "yes" for name in known},
    }
    sys.stdout.write(table(columns) + "\n")
    if sums := facts.errors_by_group(scenes):
        sys.stdout.write("\n" + error_table(sums) + "\n")
    if outside:
        raise Failure(f"{len(outside)} of {len(known)} quantities are outside their range.")


def error_table(sums):
    """Text of the table of wrong pixels by cloud regime and surface."""
    kinds = sorted({kind for counts in sums.values() for kind in counts})
    columns = {title: {} for kind in kinds for title in (f"{kind}: pixels", f"{kind}: wrong [%]")}
    for (truth, name), counts in sums.items():
        for kind, (pixels, wrong) in counts.items():
            columns[f"{kind}: pixels"][f"{truth}, {name}"] = f"{pixels:12}"
            share = f"{100 * wrong / pixels:16.1f}" if pixels else ""
            columns[f"{kind}: wrong [%]"][f"{truth}, {name}"] = share
    return table(columns)


def main(argv=None):
    """Run the command and return its exit status."""
    parser = command_parser(__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder of scenes")
    arguments = parser.parse_args(argv)
    log_to_screen(arguments.verbose)
    return exit_status(lambda: compare(arguments.folder), arguments.verbose)


if __name__ == "__main__":
    sys.exit(main())
