"""Drawings of labels and predictions."""
