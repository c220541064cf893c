"""Between checkpoints and routed models: adapters out of full fine-tunes, one checkpoint out of a routed model."""
