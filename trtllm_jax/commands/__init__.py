"""The command-line programs. They use only the public API, and import heavy packages only once they run."""
