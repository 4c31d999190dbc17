"""Parts of lab/study.py: what is compared, the steps that train it, gaps and the front, the page and its pictures."""
