"""Process start-up and tear-down, device, profiling."""
