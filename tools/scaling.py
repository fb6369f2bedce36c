r"""How training scales over replicas: runs the benchmark at several counts, or reads runs.

    python tools/scaling.py -o scaling --replicas 1 2 --ranks 2 --set epochs=3 train_dir=...
    python tools/scaling.py -o scaling --ranks 1 2 4 8 \
        --launch 'sbatch --wait --nodes={ranks} target/rivanna.sh'
    python tools/scaling.py -o scaling RUN_DIR [RUN_DIR ...]

Writes scaling.csv, scaling.txt (the same for people, with the fitted serial share) and scaling.png.
Throughput and seconds_per_epoch are that of the training steps of all epochs but the
first, as results.json gives it.
"""

import argparse
import csv
import hashlib
import json
import logging
import os
import shlex
import statistics
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import _command  # noqa: F401
from harness import REPOSITORY
from harness.parallel.rendezvous import reserve_port

COLUMNS = (
    "scaling", "replicas", "nodes", "ranks", "batch_size", "repeats", "patches_per_second",
    "seconds_per_epoch", "speed_up", "efficiency", "min", "median", "max",
)  # fmt: skip

log = logging.getLogger("scaling")


class ScalingError(ValueError):
    """What the user can mend: shown as one line."""


# --- making the runs ------------------------------------------------------------------------


def plan(replicas, ranks, kinds, batch_size, repeats):
    """List the runs to make: (replicas, ranks, batch size, repeat), repeats outermost.

    A machine that slows down for a while then slows all counts down alike.

    Args:
        replicas: Numbers of virtual devices in one process.
        ranks: Numbers of processes.
        kinds: 'strong' keeps the global batch, 'weak' the batch a replica.
        batch_size: That of one replica.
        repeats: Runs of each.
    """
    counts = [(n, 1) for n in replicas] + [(n, n) for n in ranks if (n, n) not in {(1, 1)}]
    if 1 in ranks and (1, 1) not in counts:
        counts.insert(0, (1, 1))
    runs = [
        (n, n_ranks, batch_size * (n if kind == "weak" else 1))
        for kind in kinds
        for n, n_ranks in counts
    ]
    return [(*run, repeat) for repeat in range(repeats) for run in dict.fromkeys(runs)]


def make_run(run, output, arguments):
    """Make one run; return its folder."""
    n, ranks, batch_size, repeat = run
    same = repr((arguments.config, arguments.set, arguments.launch))
    work = hashlib.sha256(same.encode()).hexdigest()[:8]  # a run of other settings is another run
    name = f"{work}-replicas{n}-ranks{ranks}-batch{batch_size}-{repeat}"
    folder = output / "runs" / name
    if folder.exists():
        log.info("%s is there already", name)
        return folder
    settings = [*arguments.set, f"batch_size={batch_size}", f"output_dir={output / 'runs'}"]
    settings += [f"run_name={name}"]
    if not arguments.launch:
        settings += [f"cpu_devices={n if ranks == 1 else 1}"]
        settings += ["gpu=0"] if arguments.replicas else []
    options = ["--config", arguments.config, "--mode", "train", "--set", *settings]
    log.info("%s ...", name)
    if arguments.launch:
        command = arguments.launch.format(ranks=ranks, replicas=n)
        subprocess.run([*shlex.split(command), *options], check=True)
    else:
        command = [sys.executable, str(REPOSITORY / "slstr_cloud.py"), *options]
        _run_here(command, ranks, output / "runs" / f"{name}.log")
    return folder


def _run_here(command, ranks, log_file):
    environments = [os.environ]
    if ranks > 1:
        sockets = [reserve_port() for _ in range(ranks)]
        workers = [f"localhost:{s.getsockname()[1]}" for s in sockets]
        for s in sockets:
            s.close()
        environments = [
            {**os.environ, "TF_CONFIG": json.dumps(
                {"cluster": {"worker": workers}, "task": {"type": "worker", "index": rank}})}
            for rank in range(ranks)
        ]  # fmt: skip
    log_file.parent.mkdir(parents=True, exist_ok=True)
    with log_file.open("w", encoding="utf-8") as file:
        processes = [subprocess.Popen(command, env=env, stderr=file) for env in environments]
        statuses = [process.wait() for process in processes]
    if any(statuses):
        raise ScalingError(f"A run ended with {statuses}; {log_file} says why.")


# --- reading them ---------------------------------------------------------------------------


def read_run(folder):
    """Read what a run says of its speed.

    Raises:
        ScalingError: If the folder holds no finished training of two epochs or more.
    """
    try:
        results = json.loads((Path(folder) / "results.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ScalingError(f"{folder} is no folder of a run: {error}.") from None
    if results["status"] != "success":
        raise ScalingError(f"{folder} holds a run that ended as '{results['status']}'. Remove it.")
    training = results.get("training")
    if not training or training["epochs_run"] < 2:
        raise ScalingError(
            f"{folder} has no training of two epochs or more: the first, which starts everything "
            "up, is left out. Set epochs to 2 at least."
        )
    return {
        "replicas": results["devices"]["replicas"],
        "nodes": results["devices"]["nodes"],
        "ranks": results["devices"]["ranks"],
        "batch_size": results["config"]["batch_size"],
        "patches_per_second": training["patches_per_second"],
        "seconds_per_epoch": statistics.median(training["train_seconds_per_epoch"][1:]),
    }


def tabulate(runs):
    """Turn runs into rows of scaling.csv.

    Runs of one global batch make a series of strong scaling, runs of one batch a replica a series
    of weak scaling, where there are two numbers of replicas or more.
    """
    series = defaultdict(list)
    for run in runs:
        series["strong", run["batch_size"]].append(run)
        series["weak", run["batch_size"] / run["replicas"]].append(run)
    rows = []
    for (scaling, _), members in sorted(series.items()):
        if len({run["replicas"] for run in members}) > 1:
            rows += [{"scaling": scaling, **row} for row in _series_rows(members)]
    return rows


def _series_rows(runs):
    points = defaultdict(list)
    for run in runs:
        points[tuple(run[k] for k in ("replicas", "ranks", "nodes", "batch_size"))].append(run)
    speeds = {
        point: [run["patches_per_second"] for run in members] for point, members in points.items()
    }
    first = min(points)  # fewest replicas, then fewest ranks
    for point in sorted(points):
        replicas, ranks, nodes, batch_size = point
        median = statistics.median(speeds[point])
        speed_up = median / statistics.median(speeds[first]) * first[0]
        yield {
            "replicas": replicas,
            "nodes": nodes,
            "ranks": ranks,
            "batch_size": batch_size,
            "repeats": len(points[point]),
            "patches_per_second": median,
            "seconds_per_epoch": statistics.median(r["seconds_per_epoch"] for r in points[point]),
            "speed_up": speed_up,
            "efficiency": speed_up / replicas,
            "min": min(speeds[point]),
            "median": median,
            "max": max(speeds[point]),
        }


def serial_share(rows):
    """Fit the share of work that does not speed up, by least squares; None without two counts.

    Strong scaling follows Amdahl, 1/S = s + (1 - s)/n, weak scaling Gustafson, S = n - s (n - 1);
    both are lines through the origin in s.
    """
    pairs = [
        (1 - 1 / n, 1 / row["speed_up"] - 1 / n)
        if row["scaling"] == "strong"
        else (n - 1, n - row["speed_up"])
        for row in rows
        if (n := row["replicas"]) > 1
    ]
    if not pairs:
        return None
    return sum(x * y for x, y in pairs) / sum(x * x for x, _ in pairs)


def write_table(rows, path):
    """Write scaling.csv."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def text_table(rows):
    """The rows for people."""
    lines = [
        "scaling  replicas  ranks  nodes  batch  patches/s (min-max)      speed-up  efficiency"
    ]
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
    return "\n".join(lines)


def draw(rows, path):
    """Draw the speed-up against the ideal line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4.5), layout="constrained")
    most = max(row["replicas"] for row in rows)
    axes.plot([1, most], [1, most], color="0.6", linestyle="--", label="ideal")
    styles = {
        ("strong", False): ("#0072b2", "o", "strong, one process"),
        ("strong", True): ("#0072b2", "s", "strong, several ranks"),
        ("weak", False): ("#d55e00", "^", "weak, one process"),
        ("weak", True): ("#d55e00", "D", "weak, several ranks"),
    }
    for (scaling, many), (colour, marker, label) in styles.items():
        members = [r for r in rows if r["scaling"] == scaling and (r["ranks"] > 1) == many]
        if members:
            base = members[0]["median"] / members[0]["speed_up"]
            errors = [
                [(r["median"] - r["min"]) / base for r in members],
                [(r["max"] - r["median"]) / base for r in members],
            ]
            axes.errorbar(
                [r["replicas"] for r in members], [r["speed_up"] for r in members], errors,
                color=colour, marker=marker, capsize=3, label=label,
                linestyle=":" if many else "-", markerfacecolor="none" if many else colour,
            )  # fmt: skip
    axes.set(xlabel="replicas", ylabel="speed-up of training", ylim=(0, None))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


# --- the program ----------------------------------------------------------------------------


def parse_arguments(argv):
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("runs", nargs="*", metavar="RUN_DIR", help="read these runs instead of making some")
    add("-o", "--output", type=Path, required=True, help="folder for the results")
    add("--config", default="config.yaml")
    add("--replicas", type=int, nargs="*", default=[], help="virtual CPU devices in one process")
    add("--ranks", type=int, nargs="*", default=[], help="processes, here or by --launch")
    add("--kinds", nargs="+", choices=("strong", "weak"), default=["strong", "weak"])
    add("--batch-size", type=int, default=32, help="global batch of one replica (default 32)")
    add("--repeats", type=int, default=3)
    add("--launch", help="command that starts {ranks} ranks and takes the program's options")
    add("--set", metavar="KEY=VALUE", nargs="+", action="extend", default=[])
    arguments = parser.parse_args(argv)
    if not (arguments.runs or arguments.replicas or arguments.ranks):
        parser.error("name runs to read, or --replicas or --ranks to make some")
    return arguments


def main(argv=None):
    """Run the program and return its exit status."""
    arguments = parse_arguments(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    output = arguments.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    try:
        folders = arguments.runs or [
            make_run(run, output, arguments)
            for run in plan(
                arguments.replicas, arguments.ranks, arguments.kinds,
                arguments.batch_size, arguments.repeats,
            )
        ]  # fmt: skip
        rows = tabulate([read_run(folder) for folder in folders])
        if not rows:
            raise ScalingError("One number of replicas shows no scaling; two at least are needed.")
    except (ScalingError, subprocess.CalledProcessError) as error:
        log.error("Error: %s", error)
        return 2
    write_table(rows, output / "scaling.csv")
    (output / "scaling.txt").write_text(text_table(rows) + "\n", encoding="utf-8")
    draw(rows, output / "scaling.png")
    log.info("%s\nTables and plot are in %s", text_table(rows), output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
