"""The processes that serve HTTP beside one engine."""
