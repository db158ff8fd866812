"""Drawn worlds, the built-in backbone that is trained on them, and `polyclip demo`."""
