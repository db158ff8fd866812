"""Standing queries: each newly ready video is compared with them; matches are events, and calls of webhooks."""
