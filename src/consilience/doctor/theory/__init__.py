"""What the L2-stability theory says, as numbers: bounds, inner products, best weights, what one more expert brings."""
