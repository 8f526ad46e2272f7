"""What a delta method is written on: leaves, what it does at a site, and what methods are made of."""
