"""How far a training run has come."""

from dataclasses import dataclass, field

from harness.console import counted, format_duration


@dataclass
class TrainingState:
    """What a checkpoint stores besides the weights, the optimizer and the trainer's totals.

    The order of the patches follows from the seed and the numbers of epoch and step; whether
    training stops follows from the history.

    Attributes:
        history: One dictionary per completed epoch, with the columns of history.csv and more.
        step: Training steps taken in the current epoch.
        seconds: Time that these steps took [s].
        input_seconds: Time that these steps waited for their batches [s].
        mlperf_bytes: Length of the MLPerf log to which a resumed run returns.
    """

    history: list = field(default_factory=list)
    step: int = 0
    seconds: float = 0.0
    input_seconds: float = 0.0
    mlperf_bytes: int = 0

    @property
    def epoch(self):
        """Number of the current epoch; the first is 1."""
        return len(self.history) + 1

    @property
    def best(self):
        """Row of the epoch with the lowest validation loss, the first of equal ones; or None."""
        return min(self.history, key=lambda row: row["val_loss"], default=None)

    def seconds_to(self, target_accuracy):
        """Seconds of training and validation until the validation accuracy first reached a target.

        That of the epoch is included; None if it has not been reached.
        """
        total = 0.0
        for row in self.history:
            total += row["seconds"]
            if row["val_accuracy"] >= target_accuracy:
                return total
        return None

    def end_epoch(self, row):
        """Append the row of the current epoch, and start the next one."""
        self.history.append(row)
        self.step, self.seconds, self.input_seconds = 0, 0.0, 0.0

    def stop_reason(self, epochs, target_accuracy=None, patience=None, training_seconds=None):
        """Why training stops now, as text; None if it continues.

        Args:
            epochs: Number of epochs to train.
            target_accuracy: Validation accuracy to reach, or None.
            patience: Epochs without a lower validation loss after which to stop, or None.
            training_seconds: Seconds of training and validation after which to stop, or None.
        """
        if not self.history:
            return None
        last = self.history[-1]
        if target_accuracy and last["val_accuracy"] >= target_accuracy:
            return f"Reached target_accuracy {target_accuracy}."
        if patience and last["epoch"] - self.best["epoch"] >= patience:
            return f"No lower validation loss for {counted(patience, 'epoch')}."
        if training_seconds and sum(row["seconds"] for row in self.history) >= training_seconds:
            return f"Trained for training_seconds, {format_duration(training_seconds)}."
        if last["epoch"] >= epochs:
            return f"Trained {counted(last['epoch'], 'epoch')}."
        return None
