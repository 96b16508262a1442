"""What an operator asks of a deployment: check it, try it, feed it."""
