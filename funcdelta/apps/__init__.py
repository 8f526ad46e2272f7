"""Programs on the library: training, benchmark, costs, trees to read, the page that picks modules, the command line."""
