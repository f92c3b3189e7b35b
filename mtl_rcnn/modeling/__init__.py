"""The network: a shared ResNet-FPN trunk and three kinds of slots (detector, RoI, image). It knows slots, never
task names."""
