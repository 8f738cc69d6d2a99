"""What makes pictures: diffusers pipelines over the networks."""
