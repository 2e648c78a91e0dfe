"""Benchmarks of the operator: cases, variants, a parity gate, one runner, CSV files and the plots drawn from them."""
