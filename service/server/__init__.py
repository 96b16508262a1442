"""Listening: uvicorn, with the limits it lacks."""
