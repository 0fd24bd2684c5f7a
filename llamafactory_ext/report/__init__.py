"""What a sweep has found, as one page: figures, tables, tests, and all that is needed to repeat it."""
