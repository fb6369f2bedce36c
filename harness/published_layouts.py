"""Configuration files of the groups at UVA and NYU, which have more than the keys of v1.1.

Most are flat: v1.1's keys, and blocks for the group's own scripts, which are ignored. In others
v1.1's keys are inside such blocks; the error then says which flat keys mean the same.
"""

import logging
import re

from harness.errors import UserError

BLOCKS = (
    "experiment", "system", "sbatch", "run", "ee", "training", "data", "image", "log", "output"
)  # fmt: skip
BESIDE_EXPERIMENT = ("mask", "identifier")  # texts
DEFAULTS = {"training_loss": "binary_crossentropy", "training_metrics": "accuracy"}  # as ours
FLAT = {  # {key in a block: key of v1.1}
    "experiment.epoch": "epochs",
    "data.training": "train_dir",
    "data.inference": "inference_dir",
    "data.model": "model_file",
    "data.output": "output_dir",
    "log.file": "log_file",
    "log.mlperf": "mlperf_logfile",
    **{
        f"{block}.{key}": key
        for block, keys in {
            "experiment": "epochs seed learning_rate batch_size train_split clip_offset no_cache "
            "nodes gpu",
            "image": "PATCH_SIZE IMAGE_H IMAGE_W N_CHANNELS MIN_SST CROP_SIZE",
            "output": "output_dir model_file log_file mlperf_logfile",
        }.items()
        for key in keys.split()
    },
}
SUBMISSION = {"org": "organisation", "submitter": "name"} | {
    key: key for key in ("division", "status", "platform", "email", "accelerators_per_node")
}

log = logging.getLogger(__name__)


def without_blocks(values, source):
    """Remove what only the scripts of these groups read, and print it.

    Args:
        values: {key: value} of a configuration file.
        source: Name of the file.

    Raises:
        UserError: If keys of v1.1 are given in blocks alone, or ask for another loss or metric.
    """
    for key, value in DEFAULTS.items():
        if values.get(key, value) != value:
            raise UserError(
                f"{source}: {key} can only be {value}, found {values[key]}. Remove the line; "
                "`loss` chooses another loss."
            )
    ignored = [key for key in BLOCKS if isinstance(values.get(key), dict)]
    ignored += [key for key in BESIDE_EXPERIMENT if key in values and "experiment" in ignored]
    ignored += [key for key in DEFAULTS if key in values]
    nested = {}
    for place, key in FLAT.items():
        value = _value(values, place)
        # "1,10,30" are the values of several runs; their scripts write each one into a flat copy.
        if value is not None and "," not in value and key not in values:
            nested.setdefault(key, value)
    if nested:
        of_block = {key: _value(values, f"submission.{name}") for name, key in SUBMISSION.items()}
        nested |= {key: v for key, v in of_block.items() if v is not None and key not in values}
        lines = "; ".join(f"{key}: {value}" for key, value in nested.items())
        raise UserError(
            f"{source} has settings in blocks; this program reads flat keys. Replace "
            f"{', '.join(ignored)} by these lines: {lines}"
        )
    if ignored:
        shown = (
            f"{key} ({', '.join(map(str, values[key]))})" if isinstance(values[key], dict) else key
            for key in ignored
        )
        log.info("Ignored in %s: %s", source, ", ".join(shown))
    return {key: value for key, value in values.items() if key not in ignored}


def _value(values, place):
    """The text at 'block.key' with references like {data.scratch} replaced; None if absent."""
    block, _, key = place.partition(".")
    value = values[block].get(key) if isinstance(values.get(block), dict) else None
    if not isinstance(value, str):
        return None

    def replace(match):
        block, _, key = match[1].partition(".")
        found = values[block].get(key) if isinstance(values.get(block), dict) else None
        return f"${key}" if block == "os" else found if isinstance(found, str) else match[0]

    for _ in range(2):  # {data.scratch} may contain {os.USER}
        value = re.sub(r"\{([\w.]+)\}", replace, value)
    return value
