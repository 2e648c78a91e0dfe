"""What every benchmark of this project uses (registry, timing, CSV files), and the benchmark of the operator itself."""
