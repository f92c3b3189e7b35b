"""Data: catalog -> records -> label space -> mapper (augment once, ask each task's Target) -> batch planner ->
loader."""
