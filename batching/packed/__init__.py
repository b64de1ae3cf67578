"""The packed engine: rows without padding that join and leave a running batch."""
