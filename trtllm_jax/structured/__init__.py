"""Structured output: what an answer's text must be, and which tokens keep it so."""
