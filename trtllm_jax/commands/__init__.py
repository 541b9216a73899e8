"""The command-line programs. They use the public API only, and import nothing heavy before they run."""
