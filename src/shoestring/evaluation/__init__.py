"""How good a model is: the exact parser of scenes, and the figures made from it and from the loss."""
