"""How coefficients move: parameterisations, the anchor, and optimizers with and without gradients."""
