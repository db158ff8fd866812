"""The HTTP calls: each parses, calls one function of a feature, and shapes the answer."""
