"""What is answered: routes, bodies, status codes."""
