"""The pieces of tools/first_results.py: steps, recipes, split of the data, rates, picture and page."""
