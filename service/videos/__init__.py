"""Videos: taken in, decoded, embedded."""
