"""Surgery: some MLPs of a dense model, the host, become mixtures of experts."""
