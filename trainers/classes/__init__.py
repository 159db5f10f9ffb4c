"""TRL's trainers and their arguments, as a thin layer over the one loop: objects in the place of names."""
