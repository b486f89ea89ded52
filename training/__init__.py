"""Training: torch models, tables of irregular time, the one loop, evaluation."""
