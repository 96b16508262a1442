"""What is asked of Stripe: its API's client, and what is read through it."""
