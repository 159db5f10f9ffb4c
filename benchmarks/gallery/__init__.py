"""Every registered loss, drawn: `logratio gallery`."""
