"""The benchmarks, as far as a mistake in them would flatter the service."""
