"""README.md and docs/: the commands work, the links lead somewhere, the numbers are right."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import build_product, results

from data_loader import SPLIT_SEED, PatchGrid
from harness import REPOSITORY
from harness.config import Config
from harness.inference.scores import THRESHOLD
from harness.networks.geometry import geometry
from make_scenes import make_dataset
from model import NETWORKS

PAGES = [path for path in sorted([*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").glob("*.md")])
         if path.name != "CHANGELOG.md"]  # fmt: skip
BLOCK = re.compile(
    r"^(?P<not_run><!-- not run: .+? -->\n)?```bash\n(?P<commands>.*?)^```$",
    flags=re.MULTILINE | re.DOTALL,
)
TINY = {  # in place of the published sizes, which take hours
    "IMAGE_H": 96, "IMAGE_W": 128, "PATCH_SIZE": 32, "CROP_SIZE": 8, "clip_offset": 2,
    "batch_size": 8, "epochs": 2,
}  # fmt: skip


def name(page):
    return str(page.relative_to(REPOSITORY))


def text(page):
    return page.read_text(encoding="utf-8")


def blocks(page):
    """The commands of a page that the text does not except, a string per block."""
    return [m["commands"] for m in BLOCK.finditer(text(page)) if not m["not_run"]]


def execute(commands, checkout):
    """Run commands as a user would who has activated the environment."""
    program = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands],
        cwd=checkout, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
             "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
    )  # fmt: skip
    assert program.returncode == 0, f"{commands}\n{program.stdout}\n{program.stderr}"
    assert "Traceback" not in program.stdout + program.stderr
    return program.stdout + program.stderr


@pytest.fixture(scope="session")
def checkout(tmp_path_factory):
    """A copy of the repository after `make demo`, with tiny scenes in data/ and a product."""
    folder = tmp_path_factory.mktemp("docs") / "cloudmask"
    files = subprocess.run(
        ["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout.split("\0")
    for file in filter(None, files):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(REPOSITORY / file, folder / file)
    commit = ["git", "-c", "user.name=me", "-c", "user.email=", "commit"]
    for command in (["git", "init", "-q"], ["git", "add", "-A"], [*commit, "-qm", "copy"]):
        subprocess.run(command, cwd=folder, check=True)
    (folder / ".venv").symlink_to(sys.prefix)  # make installs nothing that is there
    (folder / "demo.txt").write_text(execute("make demo", folder))
    demo = folder / "demo/outputs"
    shutil.copy(demo / "demo/results.json", folder)  # a page trains the run further
    make_dataset(folder / "data", train=4, inference=2, height=96, width=128, seed=7)
    build_product(folder / "products", height=96, width=128, views=["nadir"])
    # The runs of the pages have fewer scenes to train on than that of the demo.
    make_dataset(demo.parent / "few", train=12, inference=0, height=240, width=300, seed=8)
    demo_values = {"epochs": 1, "train_dir": "demo/few/one-day"}
    for file, values in {"config.yaml": TINY, "target/demo.yaml": demo_values}.items():
        config = yaml.safe_load((folder / file).read_text()) | values
        (folder / file).write_text(yaml.safe_dump(config))
    subprocess.run([*commit, "-qam", "smaller"], cwd=folder, check=True)  # for a submission
    execute("python slstr_cloud.py --config target/demo.yaml --set run_name=other", folder)
    assert {path.name for path in demo.iterdir()} == {"demo", "other"}
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=name)
def test_commands_work(page, checkout):
    for commands in blocks(page):
        execute(commands, checkout)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_to_files_and_headings(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", text(page)):
        if target.startswith("https://"):
            continue
        file, _, heading = target.partition("#")
        linked = page.parent / file if file else page
        assert linked.exists(), target
        headings = re.findall(r"^#+ (.+)$", text(linked), flags=re.MULTILINE) if heading else []
        anchors = [re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings]
        assert not heading or heading in anchors, target


def test_every_page_is_linked_from_the_readme():
    linked = re.findall(r"\]\((docs/[^)#]+\.md)", text(REPOSITORY / "README.md"))
    assert sorted(set(linked)) == [name(page) for page in PAGES if page.parent.name == "docs"]


def test_readme_fits_on_a_few_screens():
    lines = text(REPOSITORY / "README.md").splitlines()
    assert len(lines) <= 200
    assert [line for line in lines if len(line) > 100 and "](" not in line] == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_paths_in_the_text_exist(page):
    for path in re.findall(r"`((?:harness|tools|target|tests|docs)/[\w/.-]+\.\w+)`", text(page)):
        assert (REPOSITORY / path).exists(), path


def test_configuration_keys_of_the_page_exist():
    keys = yaml.safe_load((REPOSITORY / "config.yaml").read_text())
    page = text(REPOSITORY / "docs/configuration.md")
    named = [key for line in re.findall(r"^\*\*(`.+?)\*\*", page, re.M) for key in
             re.findall(r"`(\w+)`", line)]  # fmt: skip
    assert len(named) > 8
    assert set(named) <= set(keys)


def test_numbers_of_the_science_page_are_those_of_the_code():
    config, model = Config(), NETWORKS["unet"]((256, 256, 9))
    shape = geometry(model)
    grid = PatchGrid(config.image_h, config.image_w, config.patch_size, config.crop_size)
    assert config.patches_per_scene == 4 * 5  # of 1200 // 256 rows and 1500 // 256 columns
    page = " ".join(text(REPOSITORY / "docs/science.md").split())
    for fact in (
        f"{len(model.layers)} layers, {model.count_params():,} parameters",
        f"{shape.multiplications_per_pixel:,.0f} multiplications per pixel",
        f"4 x 5 = {config.patches_per_scene} patches of {config.patch_size} x {config.patch_size}",
        f"7 x 9 = {len(grid.corners)} overlapping patches; {config.crop_size // 2} pixels",
        f"global batch of {config.batch_size}; {config.clip_offset} pixels",
        f"train_size={config.train_split}, random_state={SPLIT_SEED}",
        f"probability is above {THRESHOLD}",
    ):
        assert fact in page
    assert f"({shape.radius} pixels for the U-Net)" in text(REPOSITORY / "docs/configuration.md")


def test_costs_of_the_networks_page_are_those_of_the_layers():
    rows = [
        line for line in text(REPOSITORY / "docs/networks.md").splitlines() if line[:3] == "| `"
    ]
    for row, (name, build) in zip(rows[: len(NETWORKS)], NETWORKS.items(), strict=True):
        size = geometry(build((None, None, 9)))
        cost = size.n_parameters, round(size.multiplications_per_pixel), 2 * size.radius + 1
        assert row.startswith(f"| `{name}` |")
        assert row.endswith(" | ".join(f"{number:,}" for number in cost) + " |")


@pytest.mark.slow
def test_numbers_of_the_demo_are_those_of_the_readme(checkout):
    readme = text(REPOSITORY / "README.md")
    row = next(line for line in readme.splitlines() if "`make demo` (synthetic)" in line)
    accuracy, all_cloud = map(float, re.findall(r"0\.\d{3}", row))
    inference = results(checkout)["inference"]
    assert inference["all_cloud_accuracy"] == pytest.approx(all_cloud, abs=5e-4)
    # Training amplifies rounding, which differs between kinds of processors.
    assert inference["accuracy"] == pytest.approx(accuracy, abs=0.05)


@pytest.mark.slow
def test_demo_ends_with_commands_that_work(checkout):
    end = (checkout / "demo.txt").read_text().partition("\nNext:\n")[2]
    commands = re.findall(r"^  (?:source|python) .+$", end.partition("\nand ")[0], re.MULTILINE)
    assert len(commands) == 3
    execute("\n".join(commands), checkout)
