"""What coefficients are learned for: agreement with the experts, confidence, labels, and sums of them."""
