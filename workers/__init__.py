"""GPU workers: the render line, the Celery tasks and the janitor, over farm."""
