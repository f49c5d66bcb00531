"""Evaluation heads: what raw features, codes, reconstructions and residuals are worth for a task."""
