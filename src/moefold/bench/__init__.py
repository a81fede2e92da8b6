"""Measuring speed and memory: ours, the dense MLP it replaces, and every peer that can run.

    layers     one layer, forward and backward, and what a pass of no token costs
    decode     one layer on 1 to 16 tokens, inference
    models     a sentence encoder, dense and upcycled, inference
    scaling    cost against tokens, experts, k, width and the length of a group

Nothing is timed before its values and gradients have been compared with the reference.
"""
