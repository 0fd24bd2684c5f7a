"""Many trainings from one recipe: the cells of a sweep, trained, scored, and resumed after any interruption."""
