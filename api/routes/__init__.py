"""The routes of the HTTP API, a file for each resource."""
