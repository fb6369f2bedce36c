r"""Measure how training scales over replicas: make runs at several counts, or read existing runs.

    python tools/scaling.py -o scaling --replicas 1 2 --ranks 2 --set epochs=3 train_dir=...
    python tools/scaling.py -o scaling --ranks 1 2 4 8 \
        --launch 'env SBATCH_WAIT=1 CLOUDMASK_NODES={ranks} target/slurm.sh'
    python tools/scaling.py -o scaling RUN_DIR [RUN_DIR ...]

The same command makes the runs that are missing, and repeats aborted ones. Also if a run fails, it
writes scaling.csv, scaling.txt (a table for people, with the fitted serial share) and scaling.png.
patches_per_second and seconds_per_epoch are those of the training steps of all epochs but the
first, as results.json gives them.
"""

import argparse
import hashlib
import logging
import statistics
import sys
from pathlib import Path

from _command import exit_status
from harness.config import load_config
from harness.console import log_to_screen
from harness.errors import UserError
from harness.files import write_csv, write_text
from harness.records import saved_runs
from harness.signals import install_handlers
from tools.lib.series import PlannedRun, add_run_arguments, make_runs, when_stopped

COLUMNS = (
    "scaling", "replicas", "nodes", "ranks", "batch_size", "repeats", "patches_per_second",
    "seconds_per_epoch", "speed_up", "efficiency", "min", "median", "max",
)  # fmt: skip

log = logging.getLogger("scaling")


def plan(replicas, ranks, kinds, batch_size, repeats):
    """List the runs to make: (replicas, ranks, batch size, number of the repeat).

    `batch_size` is the global batch of one replica: 'strong' keeps it, 'weak' multiplies it. All
    counts are run once before any is repeated, so that a slow hour affects all of them.
    """
    counts = [(1, 1)] * (1 in ranks) + [(n, 1) for n in replicas] + [(n, n) for n in ranks]
    growth = {"strong": lambda n: 1, "weak": lambda n: n}
    runs = [(*count, batch_size * growth[kind](count[0])) for kind in kinds for count in counts]
    return [(*run, repeat) for repeat in range(repeats) for run in dict.fromkeys(runs)]


def planned_run(run, output, arguments):
    """A run of `plan` as a PlannedRun."""
    n, ranks, batch_size, repeat = run
    settings = repr((arguments.config, arguments.set, arguments.launch))  # each has its own runs
    key = hashlib.sha256(settings.encode()).hexdigest()[:8]
    changes = [*arguments.set, f"batch_size={batch_size}"]
    if not arguments.launch:
        changes += [f"cpu_devices={n if ranks == 1 else 1}", *["gpu=0"] * bool(arguments.replicas)]
    return PlannedRun(
        output / "runs" / f"{key}-replicas{n}-ranks{ranks}-batch{batch_size}-{repeat}",
        arguments.config,
        changes,
        mode="train",
        launch=arguments.launch and arguments.launch.format(ranks=ranks, replicas=n),
        ranks=ranks,
    )


def read_run(folder):
    """Read the speed of a run; UserError unless it finished a training of two epochs or more."""
    run = saved_runs.read_run(folder)
    if run.status != "success":
        raise UserError(f"{folder} has the status '{run.status}', expected 'success'. Remove it.")
    results = run.clean_results
    training, batch_size = results["training"], results["config"].get("batch_size")
    values = {name: results["devices"].get(name) for name in ("replicas", "nodes", "ranks")}
    values |= {"batch_size": batch_size, "patches_per_second": training.get("patches_per_second")}
    seconds = training.get("train_seconds_per_epoch", [])
    if (training.get("epochs_run") or 0) < 2:
        raise UserError(
            f"{folder} should hold a training of at least two epochs, because the first one is not "
            "counted. Set epochs to 2 or more."
        )
    known = [*values.values(), *seconds]
    if len(seconds) < 2 or None in known or min(known) <= 0:
        raise UserError(
            f"{folder}/results.json should have numbers above 0 as devices, batch_size, "
            "patches_per_second and train_seconds_per_epoch. Copy it from the run again."
        )
    return {**values, "seconds_per_epoch": statistics.median(seconds[1:])}


def tabulate(runs):
    """Make the rows of scaling.csv, for each series of at least two numbers of replicas.

    Runs with the same global batch are a series of strong scaling, runs with the same batch per
    replica a series of weak scaling.
    """
    series = {}
    for run in runs:
        series.setdefault(("strong", run["batch_size"]), []).append(run)
        series.setdefault(("weak", run["batch_size"] / run["replicas"]), []).append(run)
    return [
        {"scaling": scaling, **row}
        for (scaling, _), members in sorted(series.items())
        if len({run["replicas"] for run in members}) > 1
        for row in series_rows(members)
    ]


def series_rows(runs):
    """Yield a row per count of a series; the speed-up is over the fewest replicas and ranks."""
    names, per_replica = ("replicas", "ranks", "nodes", "batch_size"), None
    points = {}
    for run in runs:
        points.setdefault(tuple(run[name] for name in names), []).append(run)
    for point, members in sorted(points.items()):
        speeds = [run["patches_per_second"] for run in members]
        median = statistics.median(speeds)
        per_replica = per_replica or median / point[0]
        yield {
            **dict(zip(names, point, strict=True)),
            "repeats": len(members),
            "patches_per_second": median,
            "seconds_per_epoch": statistics.median(run["seconds_per_epoch"] for run in members),
            "speed_up": median / per_replica,
            "efficiency": median / per_replica / point[0],
            **{"min": min(speeds), "median": median, "max": max(speeds)},
        }


def serial_share(rows):
    """Fit the share of work that does not speed up, by least squares; None without two counts.

    Strong scaling follows Amdahl, 1/S = s + (1 - s)/n, weak scaling Gustafson, S = n - s (n - 1).
    """
    pairs = []
    for row in rows:
        n, s = row["replicas"], row["speed_up"]
        pairs.append((1 - 1 / n, 1 / s - 1 / n) if row["scaling"] == "strong" else (n - 1, n - s))
    squares = sum(x * x for x, _ in pairs)  # 0 where all rows have one replica
    return sum(x * y for x, y in pairs) / squares if squares else None


def text_table(rows):
    """Format rows and the fitted serial shares as lines."""
    head = "scaling  replicas  ranks  nodes  batch  patches/s (min-max)      speed-up  efficiency"
    lines = [head]
    for row in rows:
        speeds = f"{row['median']:.1f} ({row['min']:.1f}-{row['max']:.1f})"
        lines.append(
            f"{row['scaling']:7}  {row['replicas']:8}  {row['ranks']:5}  {row['nodes']:5}  "
            f"{row['batch_size']:5}  {speeds:22}  {row['speed_up']:9.2f}  {row['efficiency']:9.0%}"
        )
    for scaling, law in (("strong", "Amdahl"), ("weak", "Gustafson")):
        share = serial_share([row for row in rows if row["scaling"] == scaling])
        if share is not None:
            words = f"{share:.1%}" if share <= 1 else "none fits, more replicas are slower here"
            lines.append(f"{law}'s serial share, {scaling} scaling: {words}")
    return "\n".join([*lines, ""])


def draw(rows, path):
    """Draw the speed-up, with the ideal line."""
    import numpy as np
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4.5), layout="constrained")
    axes = figure.subplots()
    most = max(row["replicas"] for row in rows)
    axes.plot([1, most], [1, most], color="0.6", linestyle="--", label="ideal")
    for scaling, many, colour, marker in (
        ("strong", False, "#0072b2", "o"), ("strong", True, "#0072b2", "s"),
        ("weak", False, "#d55e00", "^"), ("weak", True, "#d55e00", "D"),
    ):  # fmt: skip
        members = [r for r in rows if r["scaling"] == scaling and (r["ranks"] > 1) == many]
        if members:
            columns = ("replicas", "speed_up", "min", "median", "max")
            n, speed_up, low, middle, high = np.array([[r[c] for c in columns] for r in members]).T
            axes.errorbar(
                n, speed_up, np.stack([middle - low, high - middle]) * speed_up / middle,
                color=colour, marker=marker, capsize=3, linestyle=":" if many else "-",
                markerfacecolor="none" if many else colour,
                label=f"{scaling}, {'several ranks' if many else 'one process'}",
            )  # fmt: skip
    axes.set(xlabel="replicas", ylabel="speed-up of training", ylim=(0, None))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def parse_arguments(argv):
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("runs", nargs="*", metavar="RUN_DIR", help="read these runs instead of making some")
    add("-o", "--output", type=Path, required=True, help="folder for the results")
    add("--replicas", type=int, nargs="*", default=[], help="virtual CPU devices in one process")
    add("--ranks", type=int, nargs="*", default=[], help="processes, here or with --launch")
    add("--kinds", nargs="+", choices=("strong", "weak"), default=["strong", "weak"])
    add("--batch-size", type=int, help="global batch of one replica (default: the configuration's)")
    add("--repeats", type=int, default=3, help="runs of each count (default 3)")
    add("--launch", help="command that starts {ranks} ranks and takes the program's options")
    add_run_arguments(add)
    arguments = parser.parse_args(argv)
    if not (arguments.runs or arguments.replicas or arguments.ranks):
        parser.error("name runs to read, or use --replicas or --ranks to make some")
    if arguments.runs and (arguments.replicas or arguments.ranks):
        parser.error("runs that are named are read: omit them, or --replicas and --ranks")
    return arguments


def work(arguments):
    """Make or read runs, and write the tables and the plot."""
    output = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    if arguments.runs:
        return summarise(arguments.runs, output)
    counts = arguments.replicas, arguments.ranks, arguments.kinds
    config = load_config(arguments.config, arguments.set)
    runs = plan(*counts, arguments.batch_size or config.batch_size, arguments.repeats)
    runs = [planned_run(run, output, arguments) for run in runs]
    # A resumed run has other times than a whole one.
    make_runs(runs, resume=False, summarise=lambda folders: summarise(folders, output))


def summarise(folders, output):
    """Write the tables and the plot of runs; UserError if they show no scaling."""
    rows = tabulate([read_run(folder) for folder in folders])
    if not rows:
        raise UserError(
            "Scaling needs runs with at least two numbers of replicas and the same batch, global "
            "or per replica; found none."
        )
    write_csv(output / "scaling.csv", COLUMNS, rows)
    write_text(output / "scaling.txt", text_table(rows))
    draw(rows, output / "scaling.png")
    sys.stdout.write(text_table(rows))
    log.info("Tables and plot of %d runs are in %s", len(folders), output)


def main(argv=None):
    """Run the program and return its exit status."""
    arguments = parse_arguments(argv)
    log_to_screen(arguments.verbose)
    install_handlers()
    again = when_stopped("The same command makes the remaining runs.", arguments.launch)
    return exit_status(lambda: work(arguments), arguments.verbose, again)


if __name__ == "__main__":
    sys.exit(main())
