"""The parts of lab/study.py: variants, steps, outcomes, page and picture."""
