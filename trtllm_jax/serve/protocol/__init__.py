"""Requests and answers of every endpoint, as records."""
