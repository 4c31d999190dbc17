"""The method as pure arithmetic: depths, placement, coefficients, selection."""
