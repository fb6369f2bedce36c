"""Fill batches with patches while threads read ahead, scene after scene."""

import contextlib
import itertools
from dataclasses import dataclass

import numpy as np


@dataclass
class Batch:
    """The arrays of one step of one replica; see `data_loader.PatchBatches`."""

    channels: np.ndarray
    cloud: np.ndarray
    weight: np.ndarray
    n_missing: int  # patches that are still to be read

    @classmethod
    def empty(cls, size, patch_size, n_channels, n_patches, dtype, memory):
        """A batch of `size` slots in a ReusedMemory, of which the first `n_patches` are filled."""
        channels = memory.empty((size, patch_size, patch_size, n_channels), dtype)
        cloud = memory.empty((size, patch_size, patch_size, 1), np.uint8)
        channels[n_patches:], cloud[n_patches:] = 0, 0
        return cls(channels, cloud, (np.arange(size) < n_patches).astype(np.float32), n_patches)

    @property
    def element(self):
        """What a step takes, see `data_loader.PatchBatches`."""
        return self.channels, self.cloud, self.weight, used_slots(self.weight)


@dataclass(frozen=True)
class KeptBatch:
    """A batch of a replica whose device keeps all patches that it got.

    Attributes:
        new: Batch of the patches that are not on the device yet.
        rows: Places in `kept` of the patches of the batch, in the order of its slots.
        kept: The patches that the device of the replica holds; the new ones are appended when they
            are copied.
        size: Slots of the batch.
    """

    new: Batch
    rows: list
    kept: list
    size: int


@dataclass(frozen=True)
class SceneJob:
    """Patches of one scene that an epoch needs in consecutive steps, and their slots in batches.

    Attributes:
        epoch: From 0.
        scene: Index of the scene.
        patches: Arrays (channels, cloud) by index of the patch, to be filled.
        weights: Arrays (1,) by index of the patch.
        batches: Key (epoch, number) of the batch of each patch.
    """

    epoch: int
    scene: int
    patches: dict
    weights: dict
    batches: list


def fill_batches(epochs, n_replicas, empty_batch, read, pool, n_ahead, name):
    """Yield the batches of all epochs in order, complete.

    A batch is allocated for its first patch and yielded after its last one, so that memory does
    not grow with the number of scenes.

    Args:
        epochs: Iterable of (epoch, shares): for each batch the int (n, 2) scenes and patches; those
            of each replica in turn.
        n_replicas: Replicas of this process.
        empty_batch: Function of a number of patches that returns a Batch.
        read: Function of a SceneJob that fills its patches; called in the threads.
        pool: ReaderPool.
        n_ahead: Scenes that are read before they are needed.
        name: Function from a SceneJob to the file's name, for errors.
    """
    epochs, epochs_ahead = itertools.tee(epochs)
    begun = {}  # batches by (epoch, number)

    def read_job(job):
        read(job)
        return job.batches

    jobs = (
        job
        for epoch, shares in epochs_ahead
        for job in _scene_jobs(epoch, shares, n_replicas, begun, empty_batch)
    )
    with contextlib.closing(pool.prefetch(read_job, jobs, n_ahead, name)) as done:
        for epoch, shares in epochs:
            for number, share in enumerate(shares):
                key = epoch, number
                if not len(share):
                    begun[key] = empty_batch(0)
                while key not in begun or begun[key].n_missing:
                    for filled in next(done):
                        begun[filled].n_missing -= 1
                batch = begun.pop(key)
                yield batch
                del batch  # or its memory would be kept until the next one is complete


def kept_batches(epochs, n_replicas, size, fill):
    """Yield a KeptBatch for each share of the epochs: only new patches are read.

    Args:
        epochs: As of `fill_batches`.
        n_replicas: Replicas of this process.
        size: Slots of a batch.
        fill: Function of epochs that yields their batches.
    """
    places, kept = ([make() for _ in range(n_replicas)] for make in (dict, list))
    for epoch, shares in epochs:
        new_shares, rows = [], []
        for number, share in enumerate(shares):
            known, patches = places[number % n_replicas], list(map(tuple, share.tolist()))
            new = [patch for patch in patches if patch not in known]
            known.update(zip(new, itertools.count(len(known))))
            rows.append([known[patch] for patch in patches])
            new_shares.append(np.array(new, int).reshape(-1, 2))
        # One epoch after the other: what reads ahead would look for new patches without end.
        for number, batch in enumerate(fill([(epoch, new_shares)])):
            yield KeptBatch(batch, rows[number], kept[number % n_replicas], size)


def used_slots(weight):
    """Number of slots up to the last one of weight 1, int32."""
    used = np.flatnonzero(weight)
    return np.int32(used[-1] + 1 if used.size else 0)


def _scene_jobs(epoch, shares, n_replicas, begun, empty_batch):
    """Yield SceneJobs, in the order in which batches need them first.

    A scene at the end of a lane and the start of another is needed at two times of an epoch, and
    read twice: the batches of the second time would be kept in memory until then.
    """
    jobs, latest = [], {}  # lists of (number, slot, patch); the latest one by scene
    for number, share in enumerate(shares):
        for slot, (scene, patch) in enumerate(share.tolist()):
            places = latest.get(scene)
            if not places or number // n_replicas > places[-1][0] // n_replicas + 1:
                places = latest[scene] = []
                jobs.append((scene, places))
            places.append((number, slot, patch))
    for scene, places in jobs:
        job = SceneJob(epoch, scene, {}, {}, [])
        for number, slot, patch in places:
            if (epoch, number) not in begun:
                begun[epoch, number] = empty_batch(len(shares[number]))
            batch = begun[epoch, number]
            job.patches[patch] = batch.channels[slot], batch.cloud[slot]
            job.weights[patch] = batch.weight[slot : slot + 1]
            job.batches.append((epoch, number))
        yield job


def raise_error(path, error):
    """The default of `PatchBatches.on_bad_scene`."""
    raise error


def patch_bytes(patch_size, n_channels, dtype):
    """Memory of a patch and its label [bytes]: 2.4 MB in float32, 1.2 MB in float16."""
    return patch_size**2 * (n_channels * np.dtype(dtype).itemsize + 1)
