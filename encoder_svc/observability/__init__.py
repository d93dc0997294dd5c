"""What an operator sees from outside: metrics."""
