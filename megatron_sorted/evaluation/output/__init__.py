"""The results of an evaluation as tables, files and a picture."""
