"""Networks and the encoders around them: one architecture a file; module paths here are a file format."""
