"""Pictures, tables and pages that users look at."""
