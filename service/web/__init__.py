"""HTTP: routes, bodies, and which status code answers what."""
