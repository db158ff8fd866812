"""What keeps a data folder in order: deletion, checks, archives of collections."""
