"""What every room may use: errors that callers catch by name, and records that refuse wrong values."""
