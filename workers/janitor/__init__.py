"""The janitor: expired leases, retention, and deletion in the storage."""
