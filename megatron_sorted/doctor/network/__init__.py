"""Network test of a job: missing processes, versions that differ, speed and correctness."""
