"""Use cases over the servers: jobs, quotes, control images, exports, the audit."""
