"""What turns the science of CloudMask into a benchmark; one subject a package."""

from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
