"""The model that learns: its weights follow the coefficients, its data are calibration rows, its teachers the experts."""
