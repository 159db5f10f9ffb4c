"""Several processes: how they are started, watched and dealt work, and weights that are sharded over them."""
