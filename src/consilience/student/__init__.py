"""The model that learns: its weights follow the coefficients, calibration rows are its data, experts its teachers."""
