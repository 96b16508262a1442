"""The admin port: probes and metrics, and the page for operators."""
