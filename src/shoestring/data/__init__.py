"""From captioned images to batches: sources, scenes, the store, its order and the loader."""
