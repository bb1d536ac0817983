"""Pure, batched functions on tensors of shape (..., m, n). Needs torch and nothing else."""
