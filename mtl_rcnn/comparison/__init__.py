"""Every task's own network, chosen subsets and the network of all tasks, trained on one budget and compared."""
