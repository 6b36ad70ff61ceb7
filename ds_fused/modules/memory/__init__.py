"""What of a forward is kept for its backward, where, and what is computed again."""
