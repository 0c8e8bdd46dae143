"""Benchmarks: ceilings of a device, timings, and one module for each subcommand of ``compactor bench``."""
