"""Perplexity and downstream evaluation."""
