"""What turns the science of CloudMask into a benchmark; one subject a package."""

from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
VERSION = "0.2.0"  # of the project; pyproject.toml takes it from here
