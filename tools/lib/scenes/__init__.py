"""Synthetic scenes: their physics, label, match-ups and comparison with real scenes."""
