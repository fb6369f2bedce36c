"""Masks of scenes, and their scores."""
