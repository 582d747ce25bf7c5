"""The method: schedule and loop, guidance, gradient modes, loading, adapters. Start with draftp.py."""
