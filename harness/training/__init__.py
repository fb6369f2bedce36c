"""Training steps, losses, augmentation and checkpoints."""
