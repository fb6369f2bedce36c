"""What TensorBoard shows of a training: scalars, masks after each epoch, and a profile.

tensorboard --logdir outputs/RUN/tensorboard
"""

import numpy as np

from harness.errors import UserError, missing_package

COLDEST, WARMEST = -3.5, 1.5  # normalised S9 shown as white and black: 193 K, 303 K


class NoBoard:
    """Shows nothing: a run without `tensorboard: true`, or another rank than the chief."""

    def profiled(self, steps, first):
        """The steps, unchanged."""
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
        import tensorflow as tf

        try:
            import tensorboard  # noqa: F401  (tf.summary needs it)
        except ModuleNotFoundError as error:
            raise UserError(f"tensorboard: true: {missing_package(error.name)}") from None
        self._tf, self._folder = tf, str(folder)
        self._channels, self._cloud = channels, cloud
        self._profile_steps, self._is_profiling = profile_steps or (0, 0), False
        self._writer = tf.summary.create_file_writer(self._folder)

    def profiled(self, steps, first):
        """Iterate over training steps and profile the configured ones.

        Args:
            steps: Iterable.
            first: Number of its first step in the training.
        """
        begin, end = self._profile_steps
        for number, step in enumerate(steps, first):
            if begin <= number <= end and not self._is_profiling:
                self._tf.profiler.experimental.start(self._folder)
                self._is_profiling = True
            yield step
            if number >= end:
                self._end_profile()

    def write_epoch(self, row, model):
        """Write the numbers of an epoch, and the model's masks of the patches."""
        shown = picture(self._channels, self._cloud, model(self._channels).numpy())
        with self._writer.as_default(step=row["epoch"]):
            for name, value in row.items():
                if name not in ("epoch", "label_counts"):
                    self._tf.summary.scalar(name, value)
            self._tf.summary.image("S9, Bayesian mask, probability", shown[None, :, :, None])
        self._writer.flush()

    def close(self):
        """Finish a profile and close the files."""
        self._end_profile()
        self._writer.close()

    def _end_profile(self):
        if self._is_profiling:
            self._tf.profiler.experimental.stop()
            self._is_profiling = False


def picture(channels, cloud, probability):
    """Draw patches below each other: brightness temperature of S9, Bayesian mask, probability.

    Args:
        channels: float32 (n, P, P, C), normalised; S9 is the last channel.
        cloud: (n, P, P, 1), 0 or 1.
        probability: float32 (n, P, P, 1).

    Returns:
        float32 (n * P, 3 * P); cold pixels and clouds are white.
    """
    cold = np.clip((channels[..., -1] - WARMEST) / (COLDEST - WARMEST), 0, 1)
    rows = np.concatenate([cold, cloud[..., 0], probability[..., 0]], axis=2)  # (n, P, 3 P)
    return rows.reshape(-1, rows.shape[2]).astype(np.float32)
