"""The janitor: expires leases, applies retention, and deletes from the storage."""
