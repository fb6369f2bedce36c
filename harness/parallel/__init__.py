"""Launchers, ranks and devices."""
