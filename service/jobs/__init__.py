"""Tasks: their queues, the worker that runs them, and what watches over the worker."""
