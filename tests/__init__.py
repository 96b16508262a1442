"""The tests, in folders like those of `service/`; `support/` is what they share."""
