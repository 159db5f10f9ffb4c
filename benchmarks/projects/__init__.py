"""The loss functions, advantages and heads of other projects, held to our laws: the atlas's table of law by project."""
