"""Between physical units and model space: images, state, prompts, actions. One place, driven by the
checkpoint."""
