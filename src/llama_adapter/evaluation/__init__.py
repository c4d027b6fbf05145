"""Measuring what an adapter does: instructions here, other benchmarks through lm-evaluation-harness."""
