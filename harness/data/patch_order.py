"""Which patches each batch takes, for any number of replicas."""

import numpy as np


def epoch_steps(n_scenes, patches_per_scene, batch_size, n_mixed_scenes, seed, epoch=None):
    """Choose the patches of each global batch of an epoch, for any number of replicas.

    The scenes, shuffled once by `seed`, make a row of patches that is cut into `n_mixed_scenes`
    lanes. Every step takes the next few patches of each lane, so that a batch mixes that many
    scenes, and a rank that feeds some of the slots reads the scenes of their lanes only, in every
    epoch. Each epoch shuffles the scenes of each lane and the patches of each scene.

    Args:
        n_scenes: Number of scenes.
        patches_per_scene: Patches in each.
        batch_size: Global batch size. The last batch holds the remaining patches.
        n_mixed_scenes: Scenes mixed in one batch, at most `batch_size`.
        seed: Of the run.
        epoch: Number of the epoch; None keeps everything in order, as for validation.

    Returns:
        int64 (steps, batch_size, 2): scene and patch for each slot; -1 where the last batch has
        no patch. A slot belongs to the same lane in every step.
    """
    scenes = np.arange(n_scenes)
    patches = np.tile(np.arange(patches_per_scene), (n_scenes, 1))
    if epoch is not None:
        scenes = np.random.default_rng(seed).permutation(n_scenes)
        rng = np.random.default_rng([seed, epoch])
        patches = rng.permuted(patches, axis=1)
    row = np.stack([np.repeat(scenes, patches_per_scene), patches.ravel()], axis=1)  # (N, 2)

    n_steps = -(-len(row) // batch_size)
    slots = _balanced(batch_size, n_mixed_scenes)  # 32 slots in 8 lanes: 4 each
    first_slots = np.cumsum(slots) - slots
    in_last = _balanced(len(row) - (n_steps - 1) * batch_size, batch_size).astype(bool)
    last_slots = np.add.reduceat(in_last, first_slots, dtype=int)
    lane_ends = np.cumsum(slots * (n_steps - 1) + last_slots)

    steps = np.full((n_steps, batch_size, 2), -1)
    for lane, n, n_last, first in zip(
        np.split(row, lane_ends[:-1]), slots, last_slots, first_slots, strict=True
    ):
        if epoch is not None:
            place = rng.permutation(n_scenes)
            lane = lane[np.argsort(place[lane[:, 0]], kind="stable")]
        here = slice(first, first + n)
        steps[:-1, here] = lane[: len(lane) - n_last].reshape(n_steps - 1, n, 2)
        steps[-1, here][in_last[here]] = lane[len(lane) - n_last :]
    return steps


def _balanced(total, parts):
    """`parts` integers that add up to `total` and differ by at most one."""
    return np.diff(np.arange(parts + 1) * total // parts)


def replica_slots(batch_size, n_replicas, replica):
    """The slots of the global batch that belong to one replica, as a slice."""
    ends = np.arange(n_replicas + 1) * batch_size // n_replicas
    return slice(int(ends[replica]), int(ends[replica + 1]))


def share_of_lanes(batch_size, n_mixed_scenes, slots):
    """Share of all patches that slots, a slice, can get in any epoch: those of their lanes."""
    sizes = _balanced(batch_size, n_mixed_scenes)
    ends = np.cumsum(sizes)
    return sizes[(ends - sizes < slots.stop) & (ends > slots.start)].sum() / batch_size


def steps_of_scene(patches_per_scene, batch_size, n_mixed_scenes):
    """In how many steps the patches of a scene are, at most: 20, 4 in a step, are in 5 or 6."""
    return -(-(patches_per_scene - 1) // (batch_size // n_mixed_scenes)) + 1
