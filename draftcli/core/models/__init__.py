"""What is tuned: loading, conditioning, decoding."""
