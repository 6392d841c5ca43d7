"""Every family against its peers and its floor: `python -m benchmarks [--family NAME] [--quick]`."""
