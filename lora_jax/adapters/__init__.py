"""What kind of update a weight gets: one file for each method."""
