"""One file per task: its target, head, loss, decoding, evaluator and drawing. Named in `configs/tasks/<task>.yaml`."""
