"""The method on a model: torch and transformers only. Read `zero_init` first."""
