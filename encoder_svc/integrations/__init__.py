"""Ways to use the service from other systems."""
