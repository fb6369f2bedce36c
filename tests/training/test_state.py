import pytest

from harness.training.state import TrainingState


def state_after(val_losses, accuracy=0.5):
    """The state after epochs with these validation losses; only the last has this accuracy."""
    state = TrainingState()
    for epoch, val_loss in enumerate(val_losses, 1):
        last = epoch == len(val_losses)
        # The accuracy of training is higher, and stops nothing.
        row = {"epoch": epoch, "val_loss": val_loss, "accuracy": 1.0, "seconds": 10.0}
        state.end_epoch(row | {"val_accuracy": accuracy if last else 0.0})
    return state


@pytest.mark.parametrize(
    ("val_losses", "best"), [((3, 1, 2), 2), ((2, 1, 1, 1), 2), ((1,), 1), ((), None)]
)
def test_best_epoch_is_the_first_with_the_lowest_loss(val_losses, best):
    state = state_after(val_losses)
    assert (state.best and state.best["epoch"]) == best
    assert state.epoch == len(val_losses) + 1


def test_next_epoch_starts_at_its_first_step_without_any_time():
    state = TrainingState(step=5, seconds=2.0, input_seconds=1.0, mlperf_bytes=7)
    state.end_epoch({"epoch": 1, "val_loss": 1.0})
    assert state == TrainingState(history=[{"epoch": 1, "val_loss": 1.0}], mlperf_bytes=7)


@pytest.mark.parametrize(
    ("target", "seconds"), [(0.4, 1.0), (0.5, 3.0), (0.8, 3.0), (0.81, 15.0), (0.95, None)]
)
def test_time_to_target_ends_with_the_first_epoch_that_reaches_it(target, seconds):
    state = TrainingState()
    for row in ((1.0, 0.4), (2.0, 0.8), (4.0, 0.7), (8.0, 0.9)):
        state.end_epoch(dict(zip(("seconds", "val_accuracy"), row, strict=True)))
    assert state.seconds_to(target) == seconds
    assert TrainingState().seconds_to(target) is None


@pytest.mark.parametrize(
    ("val_losses", "options", "reason"),
    [
        ((), {}, None),
        ((3, 2), {}, None),
        ((3, 2, 1), {}, "Trained 3 epochs"),
        ((3, 2, 1, 1), {}, "Trained 4 epochs"),  # resumed with fewer epochs
        ((3,), {"target_accuracy": 0.5}, "Reached target_accuracy 0.5"),
        ((3,), {"target_accuracy": 0.51}, None),
        ((1, 2), {"patience": 1}, "No lower validation loss for 1 epoch."),
        ((1, 1), {"patience": 1}, "No lower validation loss for 1 epoch."),
        ((1, 2), {"patience": 2}, None),
        ((1, 2, 2), {"patience": 2}, "No lower validation loss for 2 epochs."),
        ((2, 1), {"patience": 1}, None),
        ((2, 1), {"training_seconds": 20}, "Trained for training_seconds, 20.0 s."),
        ((2, 1), {"training_seconds": 20.5}, None),
    ],
)
def test_training_stops_for_a_reason(val_losses, options, reason):
    found = state_after(val_losses).stop_reason(3, **options)
    assert found is None if reason is None else found.startswith(reason)
