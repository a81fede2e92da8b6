"""A small causal mixture of experts, trained by three ways of choosing experts."""
