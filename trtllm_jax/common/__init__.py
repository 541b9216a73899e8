"""What every package may use: errors that callers catch by name, and records that reject invalid values."""
