"""Evaluation: distributed inference, COCO scores, tables."""
