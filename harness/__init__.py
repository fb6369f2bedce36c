"""What turns the science of CloudMask into a benchmark; one subject a file."""
