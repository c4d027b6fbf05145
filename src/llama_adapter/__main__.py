"""`python -m llama_adapter`, which `accelerate launch -m llama_adapter` and torchrun need."""

from llama_adapter.cli import main

main()
