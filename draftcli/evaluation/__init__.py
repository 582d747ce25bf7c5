"""What the tuning bought and what it cost: metrics on pictures, comparisons, the report."""
