"""The configuration: every key, its type, range and default, and combinations that are rejected."""

import difflib
import os
import re
from collections import Counter
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import (
    AfterValidator,
    AliasGenerator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from harness.errors import UserError
from harness.files import open_regular
from harness.published_layouts import without_blocks

MAX_BYTES = 1 << 16  # of a configuration file; the one we ship has about 4500
MAX_ERRORS = 30  # reported at once
SIMILAR = 0.6  # of difflib's 0 to 1: 'epoch' and 'epochs' are at 0.9, 'foo' and 'platform' at 0.4
COMBINED = ("PATCH_SIZE", "CROP_SIZE", "IMAGE_H", "IMAGE_W", "clip_offset")
RESERVED = (  # names in a run's folder
    "config.yaml", "results.json", "history.csv", "scenes.csv", "samples.csv", "report.html",
    "report_scenes", "masks", "labels", "checkpoints", "bad_scenes", "tensorboard",
)  # fmt: skip
FILE_KEYS = ("model_file", "log_file", "mlperf_logfile")  # files that a run writes
LABELS = ("bayes", "none", "combined")  # values of `labels` that are no folder
MODEL_SUFFIXES = (".keras", ".h5")
FOLDER_KEYS = ("train_dir", "inference_dir", "output_dir", "cache_dir")
# The two names of each folder of the published data; the second ones since April 2026.
OTHER_NAME = {"one-day": "training", "ssts": "inference"}
OTHER_NAME |= {new: old for old, new in OTHER_NAME.items()}
# How numbers are written. YAML 1.1 also reads 010, 12:30 and 1_000: as 8, 750 and 1000.
NUMBER = re.compile(
    r"[-+]?((0|[1-9][0-9]{0,30})(\.[0-9]{0,30})?|\.[0-9]{1,30})([eE][-+]?[0-9]{1,3})?"
)
MAX_COUNT = 10**9
V1_UPPER_CASE = ("patch_size", "image_h", "image_w", "n_channels", "min_sst", "crop_size")


def _number(value):
    """Turn text into a number if all readers would read the same one."""
    if isinstance(value, str) and NUMBER.fullmatch(value):
        return float(value) if set(value) & set(".eE") else int(value)
    if isinstance(value, bool | str):
        raise ValueError(
            "should be a number in plain decimal digits (no leading zeros, no ':' or '_')"
        )
    return value


def _expand(value):
    """Expand ~ and $VARS; an unset variable is an error, not a directory with a strange name."""
    if not isinstance(value, str | os.PathLike):
        return value
    expanded = os.path.expanduser(os.path.expandvars(value))
    if unset := re.findall(r"\$\{?(\w+)", expanded):
        raise ValueError(f"uses the environment variable {', '.join(unset)}, which is not set")
    if expanded.startswith("~"):
        raise ValueError("begins with ~, and the home directory is unknown; write the whole path")
    return expanded


def _either_name(path):
    """A missing folder of the published data becomes the one of its other name, if that exists."""
    other = path.parent / OTHER_NAME.get(path.name, "")
    return (
        other
        if path.name in OTHER_NAME and not os.path.exists(path) and os.path.isdir(other)
        else path
    )


def _plain_name(value):
    if isinstance(value, str) and (Path(value).name != value or value.startswith(".")):
        raise ValueError("should be a plain folder name without '/' and not starting with '.'")
    if isinstance(value, str) and not (value.isprintable() and 0 < len(value.strip()) <= 200):
        raise ValueError("should have 1 to 200 characters that can be printed")
    return str(value) if isinstance(value, int | float) else value


def _labels(value):
    """Names stay; the path of a folder of masks becomes absolute."""
    return value if value in LABELS else os.path.abspath(_expand(str(value)))


def _network(value):
    """A name of the table stays; the path of a .keras file becomes absolute."""
    if not str(value).endswith(".keras"):
        return value
    return os.path.abspath(_expand(str(value)))


def _shard(value):
    """K/N with K from 0 to N-1; the last task of an array that counts from 1 is an error."""
    text = str(_expand(value))
    if not (match := re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)):
        raise ValueError("should be two whole numbers K/N, such as 3/10")
    k, n = map(int, match.groups())
    if k >= n:
        raise ValueError(
            "should be K/N with K from 0 to N-1; subtract 1 if the tasks of the array count from 1"
        )
    return text


Number = BeforeValidator(_number)
Count = Annotated[int, Number, Field(ge=1, le=MAX_COUNT)]
FilePath = Annotated[Path, BeforeValidator(_expand)]
ScenesPath = Annotated[FilePath, AfterValidator(_either_name)]


class Submission(BaseModel):
    """The `submission` block of a v1.1 file; only version and commit are not in other keys."""

    model_config = ConfigDict(frozen=True, coerce_numbers_to_str=True)

    version: str | None = None
    github_commit_version: str | None = None


class Config(BaseModel):
    """All keys, with the spelling of mlcommons/science v1.1 in the file and snake_case inside.

    config.yaml explains each key.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        validate_by_name=True,
        allow_inf_nan=False,
        coerce_numbers_to_str=True,
        alias_generator=AliasGenerator(
            alias=lambda name: name.upper() if name in V1_UPPER_CASE else name
        ),
    )

    # What and who, for the logs
    benchmark: str = "cloudmask"
    organisation: str = "unknown"
    division: str = "open"
    status: str = "research"
    platform: str = "unknown"
    accelerators_per_node: Annotated[int, Number, Field(ge=0, le=MAX_COUNT)] | None = None
    submission: Submission = Submission()
    name: str = ""
    email: str = ""

    # Data and results
    train_dir: ScenesPath = Field(Path("data/one-day"), validate_default=True)
    inference_dir: ScenesPath = Field(Path("data/ssts"), validate_default=True)
    output_dir: FilePath = Path("outputs")
    run_name: Annotated[str, BeforeValidator(_plain_name)] | None = None
    model_file: FilePath = Path("model.keras")
    log_file: FilePath = Path("cloudmask.log")
    mlperf_logfile: FilePath = Path("mlperf_cloudmask.log")
    cache_dir: FilePath | None = None
    no_cache: bool | None = None
    reader_threads: Count | Literal["auto"] = "auto"
    cache: Literal["none", "disk", "memory", "device"] = "none"
    clear_file_cache: bool = False
    on_bad_scene: Literal["stop", "skip"] = "stop"
    read_timeout: Annotated[float, Number, Field(gt=0, le=1e6)] = 600.0

    # Scenes and patches
    image_h: Count = 1200
    image_w: Count = 1500
    n_channels: Annotated[int, Number, Field(ge=4, le=MAX_COUNT)] = 9
    patch_size: Annotated[int, Number, Field(ge=8, le=MAX_COUNT)] = 256
    crop_size: Annotated[int, Number, Field(ge=0, le=MAX_COUNT, multiple_of=2)] = 80
    min_sst: Annotated[float, Number, Field(gt=0)] = 273.15

    # Training
    network: Annotated[str, BeforeValidator(_network)] = "unet"
    loss: str = "cross_entropy"
    labels: Annotated[str, BeforeValidator(_labels)] = "bayes"
    label_correction: str = "none"
    augment: str = "none"
    seed: Annotated[int, Number, Field(ge=0, lt=2**32)] = 1234
    learning_rate: Annotated[float, Number, Field(gt=0)] = 0.001
    epochs: Count = 30
    batch_size: Count = 32
    train_split: Annotated[float, Number, Field(gt=0, lt=1)] = 0.8
    clip_offset: Annotated[int, Number, Field(ge=0, le=MAX_COUNT)] = 15
    cloud_weight: Annotated[float, Number, Field(gt=0)] = 1.0
    target_accuracy: Annotated[float, Number, Field(gt=0, le=1)] | None = None
    patience: Count | None = None
    training_seconds: Annotated[float, Number, Field(gt=0)] | None = None
    shuffle_scenes: Count | Literal["auto"] = "auto"
    micro_batch: Count | Literal["auto"] = "auto"
    checkpoint_every: Count = 1

    # Inference
    shard: Annotated[str, BeforeValidator(_shard)] | None = None
    inference_mode: Literal["patches", "scene"] = "patches"
    no_data: Literal["network", "clear"] = "network"
    keep_probability: bool = False

    # Reports
    report: bool = True
    sampling: bool = True
    tensorboard: bool = False
    profile_steps: tuple[Count, Count] | None = None

    # Devices
    nodes: Count | Literal["auto"] = "auto"
    gpu: Annotated[int, Number, Field(ge=0, le=MAX_COUNT)] | Literal["auto"] = "auto"
    cpu_devices: Count = 1
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    xla: bool = False
    deterministic: bool | Literal["auto"] = "auto"

    @property
    def scene_shape(self):
        """(rows, columns, channels) of every scene."""
        return self.image_h, self.image_w, self.n_channels

    def shape_in(self, mode):
        """The `scene_shape` that a mode demands; `inference` takes any rows and columns, None."""
        return (None, None, self.n_channels) if mode == "inference" else self.scene_shape

    @property
    def uses_bayes(self):
        """Whether training reads the Bayesian mask of its scenes."""
        return self.labels in ("bayes", "combined")

    @property
    def patch_dtype(self):
        """The form in which training patches are kept and copied to devices."""
        return "float32" if self.precision == "float32" else "float16"

    @property
    def patch_shape(self):
        """(rows, columns, channels) of every patch."""
        return self.patch_size, self.patch_size, self.n_channels

    @property
    def patches_per_scene(self):
        """Training patches in a scene: 4 x 5 = 20 of 256 x 256 in 1200 x 1500."""
        return (self.image_h // self.patch_size) * (self.image_w // self.patch_size)

    @model_validator(mode="after")
    def _reject_impossible_combinations(self):
        p, problems = self.patch_size, []
        if self.crop_size >= p:
            problems.append(f"CROP_SIZE {self.crop_size} must be smaller than PATCH_SIZE {p}")
        if p > min(self.image_h, self.image_w):
            problems.append(
                f"PATCH_SIZE {p} must fit in the image of IMAGE_H {self.image_h} x "
                f"IMAGE_W {self.image_w}"
            )
        if 2 * self.clip_offset >= p:
            problems.append(
                f"clip_offset {self.clip_offset} on both sides leaves no pixel of PATCH_SIZE {p}"
            )
        if self.no_cache and self.cache_dir:
            problems.append(
                f"no_cache: true and cache_dir {self.cache_dir} contradict each other; remove one"
            )
        if self.no_cache and self.cache != "none":
            problems.append(f"no_cache: true and cache: {self.cache} contradict each other")
        if self.cache == "disk" and not self.cache_dir:
            problems.append("cache: disk needs cache_dir, a folder on a local disk")
        if isinstance(self.gpu, int) and self.gpu > 0 and self.cpu_devices > 1:
            problems.append(
                f"cpu_devices {self.cpu_devices} simulates devices on the CPU, but gpu is "
                f"{self.gpu}; set gpu: 0"
            )
        if self.profile_steps and self.profile_steps[0] > self.profile_steps[1]:
            problems.append(f"profile_steps {list(self.profile_steps)} should be [first, last]")
        if self.profile_steps and not self.tensorboard:
            problems.append("profile_steps needs tensorboard: true")
        if self.model_file.suffix not in MODEL_SUFFIXES:
            problems.append(f"model_file {self.model_file} must end in .keras or .h5")
        problems += self._wrong_file_names()
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _wrong_file_names(self):
        names = {key: getattr(self, key) for key in FILE_KEYS}
        for key, path in names.items():
            first = Path(os.path.normpath(path)).parts[:1]
            leads_out = first == ("..",) and key != "model_file"  # which may be an input
            if not path.name or path.name == ".." or leads_out:
                yield f"{key} must be a file in the run's folder or an absolute path"
            elif first and (first[0] in RESERVED or re.fullmatch(r"(rank|samples)-.*", first[0])):
                yield f"{key} {path} is the name of another file of every run; choose another name"
            elif path.is_absolute() and path.exists() and not path.is_file():
                yield f"{key} {path} is not a regular file; choose another name"
        if len({os.path.normpath(path) for path in names.values()}) < len(names):
            yield "model_file, log_file and mlperf_logfile must be three different files"


class _PlainLoader(yaml.SafeLoader):
    """YAML of texts, null, lists and keys: the type of a key says what its text means.

    Duplicate keys and aliases are rejected: a few aliases can become gigabytes.
    """

    yaml_constructors = {
        tag: construct
        for tag, construct in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.rpartition(":")[2] in ("null", "str", "seq", "map")
    }
    yaml_implicit_resolvers = {
        first: [(tag, form) for tag, form in resolvers if tag.endswith(":null")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_node(self, parent, index):
        if anchor := self.peek_event().anchor:
            raise UserError(f"the anchor or alias '{anchor}' is not supported; write the value out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        keys = Counter(str(self.construct_object(key, deep=True)) for key, _ in node.value)
        if duplicates := sorted(key for key, n in keys.items() if n > 1):
            raise UserError(f"duplicate key {', '.join(duplicates)}; keep one")
        return super().construct_mapping(node, deep)


def _parse(text):
    """Parse YAML without aliases.

    Raises:
        UserError: If that fails.
    """
    try:
        return yaml.load(text, Loader=_PlainLoader)
    except RecursionError:
        raise UserError("lists or keys are nested too deeply") from None
    except yaml.YAMLError as error:
        raise UserError(" ".join(str(error).split())) from None


def load_config(path, overrides=()):
    """Read and check a configuration.

    Args:
        path: YAML file.
        overrides: `KEY=VALUE` texts, the values in YAML; they win over the file.

    Returns:
        Config.

    Raises:
        UserError: With all errors of the file.
    """
    values, overriding = read_yaml(path), dict(map(parse_override, overrides))
    return check(without_blocks({**values, **overriding}, path), path, overriding)


def read_yaml(path):
    """Read a YAML file of 'key: value', in which all values are texts, lists, dictionaries or None.

    Raises:
        UserError: If there is no such file, or it contains something else.
    """
    try:
        with open_regular(Path(path)) as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise UserError(
                f"{path} has more than {MAX_BYTES} bytes, expected a short YAML file. Check the "
                "path."
            )
        text = content.decode("utf-8")
    except FileNotFoundError:
        raise UserError(f"No file {path}. Check the path.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from error
    try:
        values = _parse(text)
    except UserError as error:
        raise UserError(f"{path} is not valid YAML: {error}.") from None
    values = {} if values is None else values  # an empty file
    if not isinstance(values, dict):
        raise UserError(
            f"{path} should contain lines of 'key: value', found a {type(values).__name__}."
        )
    return values


def parse_override(text):
    """Parse `KEY=VALUE`, the value in YAML, into a pair; UserError if it is something else."""
    key, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"--set takes KEY=VALUE, found '{text}'.")
    try:
        return key.strip(), _parse(value)
    except UserError as error:
        raise UserError(f"--set {key}: '{value}' is not a YAML value: {error}.") from None


def check(values, source, overriding=()):
    """Turn a dictionary of values into a Config.

    Args:
        values: {key: value}.
        source: What error messages name: the file of the values.
        overriding: Keys whose value is that of the option --set.

    Raises:
        UserError: With all errors of the values.
    """
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        errors = error.errors()
    bad = {e["loc"][0] for e in errors if e["loc"]}
    if bad and not bad & set(COMBINED):  # check the combinations without the bad keys
        try:
            Config.model_validate({k: v for k, v in values.items() if k not in bad})
        except ValidationError as error:
            errors += error.errors()
    places = {}  # {file or option: its errors}
    for e in errors[:MAX_ERRORS]:
        keys = e["loc"][:1] or re.findall(r"\w+", e["msg"])  # a combination names its keys
        place = "--set" if set(keys) & set(overriding) else source
        places.setdefault(place, {})[_explain(e)] = None
    text = "; ".join(f"{place}: {'; '.join(lines)}" for place, lines in places.items())
    more = f"; and {len(errors) - MAX_ERRORS} more" if len(errors) > MAX_ERRORS else ""
    raise UserError(f"{text}{more}.")


def _explain(error):
    key = str(error["loc"][0]) if error["loc"] else ""
    if error["type"] == "extra_forbidden":
        known = [field.alias for field in Config.model_fields.values()]
        folded = {name.lower(): name for name in known}
        near = difflib.get_close_matches(key.lower(), folded, n=1, cutoff=SIMILAR)
        hint = f"similar: '{folded[near[0]]}'" if near else "config.yaml lists all keys"
        return f"unknown key {_shown(key)} ({hint})"
    message = error["msg"].removeprefix("Value error, ")
    return f"{key}: {message}, found {_shown(error['input'])}" if key else message


def _shown(value):
    """A value as text for a message; only the beginning of a very long one."""
    is_number = isinstance(value, str) and NUMBER.fullmatch(value)
    text = value if is_number else repr(value)
    return text if len(text) <= 200 else f"{text[:200]}…"


def resolved(config):
    """The configuration as a dictionary with absolute paths, so that it runs anywhere.

    Without `run_name`, since no run writes into the folder of another.
    """
    values = config.model_dump(by_alias=True, mode="json", exclude={"run_name"})
    for key in FOLDER_KEYS:
        if values[key] is not None:
            values[key] = os.path.abspath(values[key])
    return values


def recorded(config):
    """The configuration as results.json has it: all keys, with absolute paths of folders."""
    return config.model_dump(by_alias=True, mode="json") | resolved(config)


def dump_config(config, run_dir):
    """The resolved configuration as YAML text."""
    header = f"# Resolved configuration of {run_dir}; running it again repeats the run.\n"
    return header + yaml.safe_dump(resolved(config), sort_keys=False)
