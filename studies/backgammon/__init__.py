"""Comparison training against absolute training, at backgammon."""
