"""Peak memory and step time, predicted from shapes."""
