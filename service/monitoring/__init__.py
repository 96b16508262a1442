"""What a deployment is doing: processes publish it in Redis, and it is read here."""
