"""From somebody's choices between two pictures to a reward: reading them, learning from them, saying how well."""
