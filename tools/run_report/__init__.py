"""What tools/report.py does: reads the reports of runs, draws them, and writes a page."""
