"""Many trainings from one recipe: the cells of a sweep, run, scored, and gone on with after any interruption."""
