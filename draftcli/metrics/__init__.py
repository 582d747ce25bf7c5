"""What is measured of pictures and scores: statistics, diversity, signs of reward hacking."""
