"""Weights of every origin: opened without being read, read in any dialect, converted, exported."""

from evaclip.weights.load import LoadReport, load_checkpoint

__all__ = ["LoadReport", "load_checkpoint"]
