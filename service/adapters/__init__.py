"""Adapters of a collection: trained, published, measured, activated."""
