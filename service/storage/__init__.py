"""Redis: clients, scripts, key names, batching, and whether a server fits our promises."""
