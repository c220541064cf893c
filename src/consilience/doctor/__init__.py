"""The merge doctor: what the L2-stability theory says of experts, from checkpoints, training logs and probe data."""
