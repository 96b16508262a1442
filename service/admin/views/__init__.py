"""The pages, one module each: every one reads what it shows and names a template."""
