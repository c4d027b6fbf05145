"""Speed side by side with PEFT and LoRA; README.md says how to run it and by which rules."""
