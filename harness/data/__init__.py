"""Scene files: finding, checking and reading them."""
