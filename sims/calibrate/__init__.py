"""Calibration: a machine's own file, from measurements made on it."""
