"""What a run will take, worked out before it starts: evaluations, memory, settings that fit."""
