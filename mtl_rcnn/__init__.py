"""Multi-task R-CNN: one shared ResNet-FPN trunk, many tasks. Import the sub-packages you need: this one imports
nothing."""
