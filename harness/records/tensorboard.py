"""What TensorBoard shows of a training: scalars, a picture of masks each epoch, a profile of steps.

tensorboard --logdir outputs/RUN/tensorboard
"""

import numpy as np
import tensorflow as tf

from harness.errors import INSTALL_TOOLS, UserError

COLDEST, WARMEST = -3.5, 1.5  # normalised S9 that is white and black in pictures: 193 K, 303 K


class NoBoard:
    """Shows nothing: a run without `tensorboard: true`, or another rank than the chief."""

    def profiled(self, steps, first):
        """The steps, as they are."""
        return steps

    def write_epoch(self, row, model):
        """Write nothing."""

    def close(self):
        """Close nothing."""


class TensorBoard(NoBoard):
    """The event files of a run.

    Args:
        folder: Path.
        channels: float32 (n, P, P, C), normalised: patches whose masks are shown.
        cloud: uint8 (n, P, P, 1), their Bayesian mask.
        profile_steps: First and last training step to profile, counted from 1; or None.

    Raises:
        UserError: If the package tensorboard is missing.
    """

    def __init__(self, folder, channels, cloud, profile_steps=None):
        try:
            import tensorboard  # noqa: F401  (tf.summary needs it)
        except ModuleNotFoundError:
            raise UserError(
                f"tensorboard: true needs the package tensorboard. Type: {INSTALL_TOOLS}"
            ) from None
        self._folder, self._channels, self._cloud = str(folder), channels, cloud
        self._profile_steps, self._is_profiling = profile_steps or (0, 0), False
        self._writer = tf.summary.create_file_writer(self._folder)

    def profiled(self, steps, first):
        """Go through training steps, and profile those that are to be.

        Args:
            steps: Iterable.
            first: Number of the first of them in the training.
        """
        begin, end = self._profile_steps
        for number, step in enumerate(steps, first):
            if begin <= number <= end and not self._is_profiling:
                tf.profiler.experimental.start(self._folder)
                self._is_profiling = True
            yield step
            if number >= end:
                self._end_profile()

    def write_epoch(self, row, model):
        """Write the numbers of an epoch, and what the model makes of the patches."""
        shown = picture(self._channels, self._cloud, model(self._channels).numpy())
        with self._writer.as_default(step=row["epoch"]):
            for name, value in row.items():
                if name != "epoch":
                    tf.summary.scalar(name, value)
            tf.summary.image("S9, Bayesian mask, probability", shown[None, :, :, None])
        self._writer.flush()

    def close(self):
        """End a profile that is under way, and the files."""
        self._end_profile()
        self._writer.close()

    def _end_profile(self):
        if self._is_profiling:
            tf.profiler.experimental.stop()
            self._is_profiling = False


def picture(channels, cloud, probability):
    """Patches below one another: brightness temperature of S9, Bayesian mask, probability.

    Args:
        channels: float32 (n, P, P, C), normalised; S9 is the last channel.
        cloud: (n, P, P, 1), 0 or 1.
        probability: float32 (n, P, P, 1).

    Returns:
        float32 (n * P, 3 * P); what is cold, and cloud, is white.
    """
    cold = np.clip((channels[..., -1] - WARMEST) / (COLDEST - WARMEST), 0, 1)
    rows = np.concatenate([cold, cloud[..., 0], probability[..., 0]], axis=2)  # (n, P, 3 P)
    return rows.reshape(-1, rows.shape[2]).astype(np.float32)
