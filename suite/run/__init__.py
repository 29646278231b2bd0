"""Running a grid of cells, each in processes of its own."""
