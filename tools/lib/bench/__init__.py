"""What bench.py measures, apart from its command line."""
