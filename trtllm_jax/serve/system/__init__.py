"""Endpoints that generate nothing: health, models, metrics, tokens, and the page at `/`."""
