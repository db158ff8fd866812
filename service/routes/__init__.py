"""The HTTP calls: each parses, calls one function of the house, and shapes the answer."""
