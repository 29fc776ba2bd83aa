"""Measuring: simulated clicks on whole volumes against labels the model was never trained on."""
