"""Pictures, tables and pages of runs, and the drawing that all pictures share."""
