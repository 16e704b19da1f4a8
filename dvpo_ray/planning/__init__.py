"""What a run will take, from its config and the model's config.json alone: memory, time, and whether it fits."""
