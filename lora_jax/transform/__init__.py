"""`lift`: the walk over a traced function, and a rule for each family of primitives."""
