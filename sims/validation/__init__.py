"""Measured against simulated: published rows, a real log, and studies, each with its bar."""
