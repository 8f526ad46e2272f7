"""Programs on the library: training, benchmark, costs, trees, the page that picks modules, reference, command line."""
