"""The strips that a scene is predicted in: `inference_mode: scene`."""

import itertools

import numpy as np


class StripGrid:
    """Strips of a scene, each with all columns; a single strip is the whole scene.

    Strips overlap by twice the distance that the network sees around a pixel, so that the result
    equals a prediction of the whole scene.

    Args:
        height: Rows of the scene.
        width: Columns of the scene.
        patch_padding: `padding` of the scene's PatchGrid. The network pools the same pixels as in
            its patches if the distance between these divides by `multiple`.
        n_strips: Number of strips.
        radius: How far the network sees from a pixel [pixels]; a multiple of `multiple`.
        multiple: What rows and columns of the network's input must be divisible by.

    Attributes:
        padding: Rows and columns of 0 that the scene needs around it,
            ((above, below), (left, right)).
        window: (rows, cols) of a strip.
        corners: int (n_strips, 2), first row and column of each strip in the padded scene.
    """

    def __init__(self, height, width, patch_padding, n_strips, radius, multiple):
        # 1500 columns, 82 to the left in patches: 2 left and 2 right, together 1504.
        phases = (n % multiple for n, _ in patch_padding)
        self.padding = tuple(
            (n, -(n + length) % multiple) for n, length in zip(phases, (height, width), strict=True)
        )
        padded, cols = height + sum(self.padding[0]), width + sum(self.padding[1])
        n = n_strips
        rows = multiple * -(-(padded + 2 * radius * (n - 1)) // (multiple * n))
        first = [multiple * (i * (padded - rows) // (multiple * max(n - 1, 1))) for i in range(n)]
        self.window, self.corners = (rows, cols), np.array([(row, 0) for row in first])
        # Each strip is used up to the middle of its overlap with the next.
        borders = [0, *((a + rows + b) // 2 for a, b in itertools.pairwise(first)), padded]
        self._used = [
            slice(begin - row, stop - row)
            for row, (begin, stop) in zip(first, itertools.pairwise(borders), strict=True)
        ]
        self._shape = (height, width)

    def stitch(self, strips):
        """Put predictions (n_strips, rows, cols) together: (height, width)."""
        whole = np.concatenate([s[used] for s, used in zip(strips, self._used, strict=True)])
        (above, _), (left, _) = self.padding
        return whole[above : above + self._shape[0], left : left + self._shape[1]]
