"""The way in: verify, parse, admit in one script, one log line for each request."""
