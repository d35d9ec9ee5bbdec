"""Studies and the generators of the tables in docs/. Not part of the wheel."""
