"""Webhooks: endpoints of tenants, messages about events, and their delivery. See ADR 42."""
