"""What a diagnosis rests on: checkpoints in one pass, training logs, losses on probe rows."""
