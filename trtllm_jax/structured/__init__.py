"""Guided decoding: constraints on the text of an answer, and the token masks that enforce them."""
