"""Engine: launch, build, train, checkpoint, resume."""
