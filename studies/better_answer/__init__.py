"""Picking the better answer: what vectors of a sentence encoder know of a judge's preferences."""
