"""Searches: from the text to the hits."""
