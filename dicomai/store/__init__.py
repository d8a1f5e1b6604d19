"""The database: tables, states, the queue and what is read."""
