"""What a run of the pipeline will take, from config.json alone: FLOPs, memory, store, time."""
