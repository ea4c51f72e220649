"""What the tuner and the benchmarks share: cases, their checks, clocks, tables. Nothing else here imports it."""
