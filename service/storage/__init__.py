"""What is kept: database, files, and the rows that several features read."""
