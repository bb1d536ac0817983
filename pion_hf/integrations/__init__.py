"""transformers, trl and peft on one side, `pion_hf`'s optimizers on the other."""
