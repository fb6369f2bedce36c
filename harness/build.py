"""From the configuration to the objects of a run: folder, devices, trainer, batches, predictors.

What these objects call takes arrays, paths and numbers instead of the whole configuration.
"""

import contextlib
import functools
import logging
import shutil
import time
from pathlib import Path

import numpy as np
import psutil

from data_loader import MIXED_SCENES, PatchBatches, PatchGrid, SceneError, read_patches
from harness.config import LABELS
from harness.console import counted, format_bytes
from harness.data.bad_scenes import START
from harness.data.batches import patch_bytes
from harness.data.cache import cached, kept_in_memory
from harness.data.page_cache import evict
from harness.data.patch_order import replica_slots, share_of_lanes
from harness.errors import UserError
from harness.files import json_sha256, lock, walk_files
from harness.inference.masks import MaskFolder
from harness.labels.label_files import ONE, make_labels, with_labels
from harness.records.run import Run
from harness.records.run_folder import make_folder
from harness.signals import install_handlers
from harness.training.augmentation import AUGMENTATIONS, patch_rng

BOARD_PATCHES = 4  # whose masks TensorBoard shows
# Threads of `reader_threads: auto`, at most. They decode 10,000 patches/s, which eight GPUs can
# take; each of them needs memory for a scene ahead.
MAX_READER_THREADS = 16
# Of a device's memory, for the patches of `cache: device`; the rest is for network and batches.
DEVICE_SHARE = 0.6

log = logging.getLogger(__name__)


@contextlib.contextmanager
def open_run(task, ranks, found, skipped):
    """Open the devices and the folder of a run.

    Args:
        task: command_line.Task.
        ranks: Rendezvous of the ranks.
        found: preflight.FoundScenes, the same on all ranks.
        skipped: {path as text: reason} of the scenes to skip; that of the chief counts.

    Yields:
        Run, Devices and preflight.Scenes.

    Raises:
        UserError: If the devices, the folder or the scenes cannot be used.
    """
    config, mode, is_chief = task.config, task.mode, ranks.launch.rank == 0
    folder = task.folder or (make_folder(config, mode) if is_chief else None)
    try:
        work = json_sha256([mode, repr(config), found.sha256, str(task.folder)])
        devices = open_devices(config, ranks, folder=str(folder), skipped=skipped, work=work)
        check_network(config, mode)
        if mode != "inference":
            check_training(config, devices)
        chief = devices.announcements[0]
        scenes = found.split(config.train_split, chief["skipped"])
        if mode != "inference":
            choose_cache(config, devices, len(scenes.train), len(scenes.validation))
        if is_chief:  # which alone writes results
            scenes = scenes.find_synthetic(config.read_timeout)
    except BaseException:
        if folder and not task.folder:
            shutil.rmtree(folder)
        raise
    folder = folder or Path(chief["folder"])
    install_handlers(reset=False)  # TensorFlow takes SIGTERM when it connects several ranks
    in_use = f"{folder} is in use by another process. Wait for it to finish, or stop it."
    with (
        lock(folder, in_use) if is_chief else contextlib.nullcontext(),
        Run(config, devices, mode, folder, task.earlier, found.sha256, scenes.synthetic) as run,
        ranks.translated_errors(),
    ):
        if is_chief:
            run.bad_scenes.begin_part()
            if mode == "inference":  # they have been checked again
                run.bad_scenes.forget(START)
            for path, reason in skipped.items():
                run.bad_scenes.record(path, reason, START)
        yield run, devices, scenes
    ranks.watch(None)  # the others leave while the chief makes the report


def open_devices(config, ranks, **facts):
    """Set up TensorFlow on the configured devices; see parallel.devices.open_devices."""
    import harness.quiet_tensorflow  # noqa: F401  (before all that imports TensorFlow)
    from harness.parallel import devices

    return devices.open_devices(
        ranks, config.gpu, config.nodes, config.cpu_devices, config.deterministic, config.xla,
        config.seed, **facts,
    )  # fmt: skip


def clear_file_cache(config, devices, paths):
    """Evict scenes from the file cache of each node if the configuration says so.

    Args:
        config: Config.
        devices: Devices.
        paths: All scene files of the run.

    Returns:
        Counts of `page_cache.evict` over all nodes, `seconds` and whether all is `cleared`; None if
        it was not asked for.
    """
    if not config.clear_file_cache:
        return None
    begin, is_first = time.perf_counter(), devices.is_first_on_node
    decoded = walk_files(config.cache_dir) if config.cache_dir else ()
    counts = evict([*paths, *decoded] if is_first else [])  # once per node
    counts = {name: round(sum(devices.gather(n))) for name, n in counts.items()}
    total, left, unknown = counts.values()
    if left:
        log.warning(
            "The file cache is not clear: %s of %s remain in it. The file system is in memory, or "
            "another process uses the files.", format_bytes(left), format_bytes(total),
        )  # fmt: skip
    if unknown:
        log.warning(
            "Whether the file cache is clear is unknown for %s of %s: the kernel tells only those "
            "who may write to the files, and not on file systems with a cache of their own.",
            format_bytes(unknown), format_bytes(total),
        )  # fmt: skip
    if not left and not unknown:
        log.info("  file cache  removed %s of scenes from it", format_bytes(total))
    seconds = time.perf_counter() - begin
    return {**counts, "seconds": seconds, "cleared": left == unknown == 0}


def check_network(config, mode):
    """Check that the network, or the model to mask with, suits the configuration.

    Raises:
        UserError: If it does not take patches of the configured size, cannot be read or saved, or
            lacks the views that label_correction takes.
    """
    import keras

    from harness.networks.model_files import build_network, load_model, with_views

    if mode == "inference":
        load_model(config.model_file, config.patch_shape)
    else:
        model = build_network(config.network, config.patch_shape)
        if config.label_correction == "co_teaching" and with_views(model).output_shape[-1] != 2:
            raise UserError(
                f"label_correction: co_teaching takes a network of two views, and {model.name} has "
                "one. Set network: two_views, or another label_correction."
            )
        is_plain = all(isinstance(each, keras.Layer) for each in model.operations)
        if config.model_file.suffix == ".h5" and not is_plain:
            raise UserError(
                f"Keras cannot read {model.name} from an .h5 file, since it has operations between "
                "its layers. Set model_file to a name that ends in .keras."
            )
        keras.utils.set_random_seed(config.seed)  # the weights have consumed random numbers


def check_training(config, devices):
    """Check what can only be checked once devices and tables are known.

    Raises:
        UserError: If batch_size, loss or augment cannot be used.
    """
    from harness.training.label_noise import LABEL_CORRECTIONS
    from harness.training.losses import LOSSES

    if config.batch_size < devices.n_replicas:
        raise UserError(
            f"batch_size {config.batch_size} is the global batch of all replicas, and there are "
            f"{devices.n_replicas}. Set it to at least {devices.n_replicas}."
        )
    choose(LOSSES, "loss", config.loss)
    choose(LABEL_CORRECTIONS, "label_correction", config.label_correction)
    choose(AUGMENTATIONS, "augment", config.augment)


def choose(table, key, name):
    """The entry of a table that a configuration key names."""
    if name not in table:
        raise UserError(f"Unknown {key} '{name}'. Choose one of {', '.join(table)}.")
    return table[name]


def open_trainer(config, devices):
    """A new network on all devices, with its optimizer and loss."""
    from harness.networks.model_files import build_network
    from harness.training.label_noise import LABEL_CORRECTIONS, ForwardCorrection
    from harness.training.losses import LOSSES
    from harness.training.trainer import POLICIES, Trainer

    policy = POLICIES[config.precision]
    return Trainer(
        devices.strategy,
        functools.partial(build_network, config.network, config.patch_shape, policy),
        choose(LOSSES, "loss", config.loss),
        config.learning_rate,
        config.batch_size,
        devices.micro_batch(config.micro_batch, config.batch_size),
        config.clip_offset,
        config.cloud_weight,
        loss_scaling=config.precision == "float16",
        xla=config.xla,
        label_one=1 if config.labels == "bayes" else ONE,
        forward_correction=ForwardCorrection if config.loss == "forward_correction" else None,
        label_correction=choose(LABEL_CORRECTIONS, "label_correction", config.label_correction),
        patch_dtype=config.patch_dtype,
    )


def open_labels(config, devices, run, scenes):
    """The folder of mask files that training takes its labels from; None for the Bayesian mask."""
    if config.labels == "bayes":
        return None
    if config.labels not in LABELS:
        return Path(config.labels)
    folder, paths = run.path("labels"), sorted([*scenes.train, *scenes.validation])
    on_bad_scene = run.bad_scenes.handler("training", paths)
    make_labels(folder, paths, config.scene_shape, config.seed, devices, on_bad_scene)
    return folder


def choose_cache(config, devices, n_train, n_validation=0):
    """Where the patches of training are kept beside `cache_dir`.

    Args:
        config: Config.
        devices: Devices.
        n_train: Scenes to train on.
        n_validation: Scenes to validate with; their patches are kept in the memory of the host.

    Returns:
        'none', 'memory' or 'device', and why it is not what `cache` says, or None.

    Raises:
        UserError: If the memory of the host is too small.
    """
    if config.cache not in ("memory", "device"):
        return "none", None
    batch_size, n_lanes = config.batch_size, min(mixed_scenes(config, devices), config.batch_size)
    own = [replica_slots(batch_size, devices.n_replicas, r) for r in devices.replicas]
    scene_bytes = config.patches_per_scene * patch_bytes(
        config.patch_size, config.n_channels, config.patch_dtype
    )
    reason = None
    if config.cache == "device":
        share = max(share_of_lanes(batch_size, n_lanes, slots) for slots in own)
        needed, limit = int(n_train * share * scene_bytes), int(DEVICE_SHARE * devices.memory())
        if config.augment != "none":
            reason = f"augment: {config.augment} changes patches on the host in every epoch"
        elif needed > limit:
            reason = (
                f"the patches of a device take {format_bytes(needed)}, and {DEVICE_SHARE:.0%} of "
                f"its memory are {format_bytes(limit)}"
            )
    cache = "memory" if reason else config.cache
    share = share_of_lanes(batch_size, n_lanes, slice(own[0].start, own[-1].stop))
    needed = n_validation / devices.n_ranks + (cache == "memory") * n_train * share
    needed = int(needed * scene_bytes) * devices.n_ranks_on_node
    free = psutil.virtual_memory().available
    if needed > free:
        why = f" ({reason})" if reason else ""
        raise UserError(
            f"cache: {config.cache} keeps {format_bytes(needed)} of patches in the memory of a "
            f"node{why}, but only {format_bytes(free)} are free. Set cache: none, or cache_dir to "
            "a local disk; half precision and more nodes need less."
        )
    return cache, reason


def mixed_scenes(config, devices):
    """Scenes mixed in a batch of training."""
    auto = config.shuffle_scenes == "auto"
    return max(MIXED_SCENES, devices.n_ranks) if auto else config.shuffle_scenes


def open_batches(config, devices, paths, labels=None, validate=False, **options):
    """The batches of training patches, or of validation patches in order.

    Args:
        config: Config.
        devices: Devices.
        paths: Scene files.
        labels: Folder of `open_labels`.
        validate: Whether the scenes are for validation.
        options: More arguments of data_loader.PatchBatches.
    """
    micro_batch = devices.micro_batch(config.micro_batch, config.batch_size)
    read = functools.partial(
        read_patches, shape=config.scene_shape, patch_size=config.patch_size,
        labelled=config.uses_bayes,
    )  # fmt: skip
    if config.cache_dir:
        label = "" if config.uses_bayes else " unlabelled"
        label += "" if config.patch_dtype == "float32" else f" {config.patch_dtype}"
        read = cached(read, config.cache_dir, f"{config.scene_shape} {config.patch_size}{label}")
    if labels:
        read = with_labels(
            read, labels, config.scene_shape, config.patch_size, config.labels == "combined"
        )
    cache, reason = choose_cache(config, devices, len(paths))
    if cache == "device" and validate:
        cache = "memory"
    if cache == "memory":
        read = kept_in_memory(read)
    if reason and not validate:
        log.warning("cache: device is replaced by cache: memory, as %s.", reason)
    n_threads = config.reader_threads
    if n_threads == "auto":
        n_threads = min(devices.n_cores, MAX_READER_THREADS)
    # The sums of validation are the same for any batch; a small one leaves memory to training.
    small_batch = micro_batch * devices.n_replicas
    batches = PatchBatches(
        paths,
        read,
        patch_size=config.patch_size,
        patches_per_scene=config.patches_per_scene,
        n_channels=config.n_channels,
        batch_size=small_batch if validate else config.batch_size,
        replicas=devices.replicas,
        n_replicas=devices.n_replicas,
        n_mixed_scenes=devices.n_ranks if validate else mixed_scenes(config, devices),
        seed=config.seed,
        shuffle=not validate,
        multiple=micro_batch,
        read_timeout=config.read_timeout,
        n_threads=n_threads,
        augment=patch_augmentation(config.augment),
        dtype=config.patch_dtype,
        on_device=cache == "device",
        **options,
    )
    if not validate:
        log.info(
            "  input       %s, %s patches, at most %s, cache: %s",
            counted(n_threads, "reader thread"), batches.dtype, format_bytes(batches.max_bytes),
            "disk" if cache == "none" and config.cache_dir else cache,
        )  # fmt: skip
    return batches


def patch_augmentation(name):
    """The augmentation of PatchBatches: a function of one patch and its key; None for none."""
    augment = choose(AUGMENTATIONS, "augment", name)
    return augment and (lambda channels, cloud, key: augment(channels, cloud, patch_rng(*key)))


def open_scene_predictor(config, devices, model, device):
    """The model on one device, ready to predict scenes of any size, first that of `config`."""
    from harness.inference.predictor import ScenePredictor

    make = functools.partial(open_predictor, config, devices, model, device)
    return ScenePredictor(make, config.image_h, config.image_w)


def open_predictor(config, devices, model, device, height=None, width=None):
    """The model on one device, ready to predict scenes of one size as `inference_mode` says."""
    from harness.inference.predictor import Predictor, predictor_that_fits
    from harness.training.trainer import POLICIES

    height, width = height or config.image_h, width or config.image_w
    policy = POLICIES[config.precision]
    grid = PatchGrid(height, width, config.patch_size, config.crop_size)
    if config.inference_mode == "patches":
        batch = devices.micro_batch(config.micro_batch, config.batch_size, replicas=1)
        return Predictor(model, device, grid, batch, policy, config.xla)
    return predictor_that_fits(model, device, height, width, grid.padding, policy, config.xla)


def open_reference_predictor(config, devices, model, device):
    """The model in overlapping patches and float32, with which `inference_mode: scene` compares."""
    reference = {"inference_mode": "patches", "precision": "float32", "xla": False}
    return open_scene_predictor(config.model_copy(update=reference), devices, model, device)


def open_masks(config, devices, run):
    """The folder of the run's masks, see MaskFolder."""
    return MaskFolder(
        run.path("masks"), devices.check, run.model_file, config.no_data, run.was_complete
    )


def board_patches(config, path):
    """The patches of a scene whose masks TensorBoard shows: some of its middle row.

    Returns:
        float32 (n, P, P, C), normalised channels, and uint8 (n, P, P, 1), the Bayesian mask.
    """
    size = config.patch_size
    n_rows, n_cols = config.image_h // size, config.image_w // size
    channels = np.zeros((min(n_cols, BOARD_PATCHES), *config.patch_shape), np.float32)
    cloud = np.zeros((*channels.shape[:3], 1), np.uint8)
    pairs = zip(channels, cloud, strict=True)
    with contextlib.suppress(SceneError):  # a bad scene is met again by the validation
        patches = dict(enumerate(pairs, n_rows // 2 * n_cols))
        read_patches(path, patches, config.scene_shape, size, config.uses_bayes)
    return channels, cloud
