"""Benchmarks that need more than the operator: training steps, backends trained side by side, tokenizing."""
