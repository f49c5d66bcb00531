"""Evaluation inside Lightning training runs."""
