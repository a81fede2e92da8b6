"""What is computed on a CPU by code compiled where it runs; torch's own operations stand in."""
