"""What acts where: names in a config resolved once to sites, spans, shared leaves and their names."""
