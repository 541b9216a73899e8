"""HTTP itself: bodies, errors, streams and limits, whatever the endpoint."""
