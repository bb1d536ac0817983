"""From a model to the role of every parameter, and to param groups."""
