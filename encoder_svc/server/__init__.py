"""The gRPC server: servicer, health, start-up and drain."""
