"""The dashboard: pages, sessions, templates and static files."""
