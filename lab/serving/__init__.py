"""What `lab.bench_serving` shares: servers, their clients, parts of the measurement, the page."""
